"""``bundle.json``: what a bundle consists of, as structs. Knows nothing of any model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from zimgkit.engines.decoding import Count, Number
from zimgkit.engines.errors import BundleError

SCHEMA_VERSION = 2
"""Schema 1 had one ``source``, ``zimg_version``, no tasks, and ``kept`` where quantization has ``unquantized``."""
MANIFEST = "bundle.json"
CHECKPOINT = "checkpoint"
"""The role of the source that every bundle has."""


TEXT_TO_IMAGE = "text-to-image"
"""The task that every bundle has."""


POSITIVE = ".positive"
"""What ends the name of a component whose weights have LoRAs for the branch of the prompt alone."""


PIECES = ("head", "body", "tail")
"""What a denoiser may be cut into: all up to its first block; the other blocks; what follows."""


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output of a graph: element type, and shape; a name stands for a dynamic dimension."""

    dtype: str
    shape: tuple[int | str, ...]


CPU_GRAPH = "onnxruntime"
"""The key of the graph that computes in float32 with the operators that ONNX Runtime has for CPUs alone."""


class Component(msgspec.Struct, frozen=True, omit_defaults=True):
    """One part of the model: its graphs, its weights, what goes in and what comes out."""

    weights: tuple[str, ...]
    """Safetensors files of the bundle that hold its tensors; where several have a name, the last one counts."""
    graphs: dict[str, str] = {}
    """Element type the graph computes in, or one of these keys -> ONNX file. All of them point into the same weights.

    The first one computes in the bundle's own precision.
    """
    inputs: dict[str, TensorSpec] = {}
    outputs: dict[str, TensorSpec] = {}
    tensors: tuple[str, ...] = ()
    """Of a component without a graph: the tensors that it consists of."""
    parameters: int = 0
    """How many numbers it has."""
    weight_bytes: int = 0
    """How many bytes of the files are its own; linked files may hold other components' tensors too."""
    lora: str | None = None
    """The last of ``weights``, where LoRAs were merged: the tensors they touch. The other files hold none of that."""
    base: str | None = None
    """A file beside ``weights``: tensors that LoRAs touch, as the checkpoint has them, for the next set of LoRAs."""
    variant_of: str | None = None
    """The component whose weights these are: a variant is more graphs over the same files.

    One for the branch of the prompt alone has a file besides, of the tensors that are others there.
    """
    prefixes: dict[str, str] = {}
    """Of ``weights``, those with tensors of another network -> what goes before their names here."""


Length = Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)]
Range = tuple[Length, Length, Length]
"""Of a dynamic dimension: min, opt and max."""


class Refit(msgspec.Struct, frozen=True):
    """What an engine's weights are exchanged for whenever it is loaded."""

    source: str
    """:meth:`Bundle.source_hash` of the graph and weights that it has then."""
    tensors: tuple[str, ...]
    """Those that may differ from what it was compiled from."""


class CompiledEngine(msgspec.Struct, frozen=True, omit_defaults=True):
    """One component, compiled ahead for one kind of device by one version of one compiler."""

    component: str
    file: str
    """What the backend loads, in the folder of this compiler and device below ``engines/``."""
    backend: str
    """Which backend runs it: ``"tensorrt"`` or ``"tensorrt-rtx"``."""
    compiler: str
    """The module that compiled it, such as ``"tensorrt"`` or ``"tensorrt_rtx"``."""
    version: str
    """Of the compiler; it runs with this version only."""
    device: str
    """The architecture it runs on, such as ``"sm90"``, or ``"any"``."""
    source: str
    """:meth:`Bundle.source_hash` of what it was compiled from."""
    profiles: tuple[dict[str, Range], ...]
    """Each a set of ranges it serves, by dynamic dimension; dimensions without a range take any length."""
    memory_bytes: int = 0
    """Device memory it needs beside the plan's own bytes, for the largest shapes, as the compiler says."""
    weight_streaming_budget: int | None = None
    """Bytes of weights kept on the device at the most, the rest being streamed to it; as many as fit when None."""
    streamable: bool = False
    """Whether weights can be streamed: how many stay is settled when it is loaded."""
    refittable: bool = False
    """Whether it can take other weights than it was compiled from."""
    refit: Refit | None = None
    stripped: bool = False
    """Whether the plan has no weights, and takes the bundle's when it is loaded."""
    plugins: bool = False
    """Whether it has kernels of zimgkit's own."""
    attention: tuple[int, int] = (0, 0)
    """How many attentions became one fused kernel each, and how many did not."""
    products: tuple[int, int] = (0, 0)
    """How many multiplications of quantized numbers are computed in 8 bits, and how many are not."""
    data: str | None = None
    """A second file, which ``file`` points into."""

    @property
    def files(self) -> tuple[str, ...]:
        """Its files in the bundle."""
        return (self.file,) if self.data is None else (self.file, self.data)

    @property
    def serves(self) -> str:
        """:meth:`Bundle.source_hash` of the weights it runs with. Where the bundle's differs now, it is stale."""
        return self.refit.source if self.refit else self.source


class FileRecord(msgspec.Struct, frozen=True):
    """What a file of the bundle must be."""

    size: int
    sha256: str


class Source(msgspec.Struct, frozen=True):
    """What weights of a bundle came from."""

    model: str
    """As the user named it."""
    revision: str | None = None
    files: dict[str, int] = {}
    """The checkpoint's weight files and their sizes in bytes."""


class TextConfig(msgspec.Struct, frozen=True):
    """How a prompt becomes token ids, and which of the encoder's rows are kept."""

    prefix: str
    suffix: str
    drop: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
    """Leading rows of the encoder's output that belong to the template and are dropped."""
    max_tokens: Count
    """Token ids past this many are cut, template included."""
    max_sequence_length: Count
    """Rows kept after the drop, unless the caller asks for another number."""


class ReferencePictures(msgspec.Struct, frozen=True):
    """How a checkpoint takes the pictures that a prompt speaks of."""

    introduction: str
    """What stands before each in the prompt; ``{number}`` is its number, from 1."""
    vision_area: Count
    """Pixels that the vision encoder reads of each."""
    latents_area: Count
    """Pixels whose latents stand beside those that are drawn."""
    most: Count
    """How many it takes at once."""
    auto_resize: bool = True
    """Whether they are brought to these areas where the caller does not say."""
    rope_interpolation: bool | None = False
    """Whether they span the positions of what is drawn where the caller does not say; None where they never do."""
    least: Annotated[int, msgspec.Meta(ge=0, le=1)] = 1
    """How many there must be; 0 where it draws from text alone as well."""
    crops: bool = False
    """Whether larger ones alone are reduced, and their edges cut off; others are stretched to the areas."""
    shortest_side: Count = 1
    """How short a side may be, in pixels."""
    most_aspect: Number = 200.0
    """How many times a side may be as long as the other."""


class Layers(msgspec.Struct, frozen=True):
    """How a checkpoint takes a picture apart."""

    resolution: Count = 640
    """The square root of the pixels of a layer, where the caller does not say."""
    layers: Count = 4
    """Into how many, likewise."""


class Control(msgspec.Struct, frozen=True, omit_defaults=True):
    """A ControlNet that a bundle has: what pictures it takes, and the denoiser with it."""

    name: str
    """What calls say; no other net of the bundle has it."""
    kind: str
    """As the family calls nets of its architecture."""
    source: str
    """The role of its weights in :attr:`Manifest.sources`."""
    component: str
    """The variant of the denoiser that has this net alone."""
    takes: tuple[str, ...]
    """Of ``"image"``, ``"mask"`` and ``"inpaint_image"``, those that it may be given."""
    needs: tuple[str, ...] = ()
    """Of these, what it cannot do without."""
    scale: Number = 1.0
    """How strongly it acts where a call does not say."""
    combines: str = ""
    """The variant that has all nets with the same here, where the bundle has several; none where it acts alone."""
    settings: dict[str, Any] = {}
    """What else the host side has to know, as the family has it."""


class Defaults(msgspec.Struct, frozen=True):
    """What a call uses where the caller says nothing: the checkpoint's own recommendation."""

    num_inference_steps: Count
    guidance_scale: Number
    height: Count
    width: Count
    negative_prompt: str | None = None


class Kept(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of a component's quantized linears where the checkpoint's own precision was to be kept."""

    exact: int = 0
    """How many have the integers and the scales of its file."""
    rounded: int = 0
    """How many were rounded again."""
    error: float = 0.0
    """Of these: the norm of what was rounded off over that of the file's values."""


class Quantization(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a bundle's linears were quantized."""

    precision: str
    """``"fp8"``, ``"int8"``, ``"int8-dynamic"``, ``"int8-weights"`` or ``"int4-weights"``."""
    unquantized: dict[str, dict[str, str]] = {}
    """Component -> the weights of linears that are stored in the bundle's precision -> why."""
    inputs: dict[str, dict[str, str]] = {}
    """Component -> a quantized weight -> the one after which the scales of its input are named, where it has any."""
    range: str = ""
    """Which range of a linear's inputs is represented: ``"max"``, ``"percentile"`` or ``"mse"``."""
    smooth: float = 0.0
    """SmoothQuant's alpha."""
    calibration: dict[str, Any] = {}
    """What the inputs' ranges were measured on."""
    bound: float | None = None
    """What the recipe asks of the cosine of every velocity and the float32 network's: at least this."""
    kept: dict[str, Kept] = {}
    """Component -> what was kept of its file, where it was asked for."""


Steps = Annotated[tuple[float, ...], msgspec.Meta(min_length=1)]
"""A number for each step."""


class Difference(msgspec.Struct, frozen=True):
    """How far pictures and what leads to them are from those of the same checkpoint in float32."""

    velocity_relative: Steps
    """By step: the norm of what the denoiser gives too much or too little over that of what it should give, from the
    float32 run's latents; the mean over pictures and branches of guidance."""
    velocity_cosine: Steps
    """Likewise the cosine; the least."""
    latents_relative: Steps
    """By step: of the latents after it, each run on its own latents; the mean over pictures."""
    latents_cosine: Steps
    """Likewise the cosine; the least."""
    psnr: float | None
    """Of the pictures, in dB, from their mean squared error; None where there is none."""
    ssim: float
    """The mean over pictures."""
    lpips: float | None = None
    """Likewise; None where it could not be measured."""


class Cost(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a bundle's precision costs, measured."""

    prompts: tuple[str, ...]
    first_seed: int
    """Of the first prompt's noise; each further one has the next."""
    width: int
    height: int
    num_inference_steps: int
    backend: str
    """What ran the bundle."""
    difference: Difference
    floor: Difference
    """Of a bundle that is not quantized, in bfloat16 weights and arithmetic: what remains without quantization."""
    captions: int = 0
    """How many pictures were judged, where the checkpoint is one that a judge knows."""
    accuracy: dict[str, float] = {}
    """How many things a caption tells of -> the share of pictures that show them."""
    float32_accuracy: dict[str, float] = {}
    """Likewise of the float32 bundle."""

    def __post_init__(self) -> None:
        if self.accuracy.keys() != self.float32_accuracy.keys():
            raise ValueError("accuracy and float32_accuracy are of other captions")

    @property
    def cosine(self) -> float:
        """The least cosine of a velocity."""
        return min(self.difference.velocity_cosine)


class CacheCost(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a cached run costs and saves, measured against the same bundle's without a cache."""

    prompts: tuple[str, ...]
    first_seed: int
    """Of the first prompt's noise; each further one has the next."""
    width: int
    height: int
    backend: str
    speed: Number
    """How many times as fast whole pictures are."""
    psnr: float | None
    """Of the pictures, in dB, from their mean squared error; None where there is none."""
    ssim: float
    """The mean over pictures."""
    lpips: float | None = None
    """Likewise; None where it could not be measured."""
    captions: int = 0
    """How many pictures were judged, where the checkpoint is one that a judge knows."""
    accuracy: dict[str, float] = {}
    """How many things a caption tells of -> the share of pictures that show them."""
    uncached_accuracy: dict[str, float] = {}
    """Likewise without a cache."""

    def __post_init__(self) -> None:
        if self.accuracy.keys() != self.uncached_accuracy.keys():
            raise ValueError("accuracy and uncached_accuracy are of other captions")


StepMask = Annotated[str, msgspec.Meta(pattern="^1[01]*$", max_length=1000)]
"""A digit for each step: 1 where it is computed in full."""
CACHE_NAME = re.compile(r"(?!(off|dynamic)$)[a-z][a-z0-9_.-]{0,63}")
"""What a bundle may call a mask."""


class CacheMask(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which steps of a schedule are computed in full: what was found to suit a checkpoint."""

    steps: StepMask
    """Of both branches of guidance."""
    negative: StepMask | None = None
    """Of the negative one, where it has its own."""
    order: Annotated[int, msgspec.Meta(ge=0, le=1)] = 1
    """Of the extrapolation from full steps."""
    reuse: Literal["residual", "velocity"] | None = None
    """What is taken over from these; None for the residual where the denoiser is cut, else the velocity."""
    change: tuple[float, ...] = ()
    """By step, where it was measured: how much the first block's residual differs from that of the step before."""
    cost: CacheCost | None = None

    def __post_init__(self) -> None:
        if self.negative is not None and len(self.negative) != len(self.steps):
            raise ValueError("steps and negative are of other lengths")

    @property
    def num_inference_steps(self) -> int:
        """Of how many steps it is."""
        return len(self.steps)


class MergedLora(msgspec.Struct, frozen=True):
    """A LoRA that was merged into the weights."""

    source: str
    """The file, or how its hub calls it."""
    sha256: str
    scale: float

    @property
    def file(self) -> str:
        """Its file's name."""
        return re.split(r"[/:]", self.source)[-1]


class Manifest(msgspec.Struct, frozen=True):
    """``bundle.json``."""

    schema_version: int
    zimgkit_version: str
    """Of what built it."""
    family: str
    name: str
    """The checkpoint's short name, for people."""
    precision: str
    """The element type of the weights, of those that are not quantized."""
    tasks: tuple[str, ...]
    """What it can be asked for, such as ``"text-to-image"``."""
    sources: dict[str, Source]
    """What its weights came from, by role: :data:`CHECKPOINT`, and whatever was attached to that."""
    text: TextConfig
    defaults: Defaults
    scheduler: dict[str, Any]
    config: dict[str, dict[str, Any]]
    """The checkpoint's own config per component, which the host side reads sizes and constants from."""
    components: dict[str, Component]
    files: dict[str, FileRecord]
    """Every file of the bundle but the manifest itself."""
    references: ReferencePictures | None = None
    """How it takes pictures that a prompt speaks of, where it does."""
    layers: Layers | None = None
    """How it takes a picture apart, where it does."""
    controls: tuple[Control, ...] = ()
    """Its ControlNets, in the order in which calls number them."""
    tools: dict[str, str] = {}
    """Versions of what built it."""
    engines: tuple[CompiledEngine, ...] = ()
    """What was compiled from it."""
    loras: tuple[MergedLora, ...] = ()
    """What was merged into its weights."""
    positive_loras: tuple[MergedLora, ...] = ()
    """What was merged into those of the branch of the prompt alone, besides."""
    base_defaults: Defaults | None = None
    """The defaults without LoRAs, where those or the user replaced them."""
    base_scheduler: dict[str, Any] | None = None
    """Likewise the scheduler."""
    quantization: Quantization | None = None
    cost: Cost | None = None
    """What the precision costs, where that was measured."""
    caches: dict[str, CacheMask] = {}
    """Name -> a mask that was calibrated for this checkpoint, which calls may name."""

    def __post_init__(self) -> None:
        if CHECKPOINT not in self.sources:
            raise ValueError(f"sources has no {CHECKPOINT!r}")
        if len({control.name for control in self.controls}) < len(self.controls):
            raise ValueError("two controls have one name")
        for control in self.controls:
            if control.source not in self.sources or control.component not in self.components:
                raise ValueError(f"the control {control.name!r} has no source, or no component")
        for name in self.caches:
            if not CACHE_NAME.fullmatch(name):
                raise ValueError(f"a cache is called {name!r}")

    @property
    def unmeasured_caches(self) -> dict[str, CacheMask]:
        """Its masks without what they cost: they suit other weights of the same network, of which that is unknown."""
        return {name: msgspec.structs.replace(mask, cost=None) for name, mask in self.caches.items()}

    @property
    def quantized(self) -> str:
        """The precision of what is quantized; empty where nothing is."""
        return self.quantization.precision if self.quantization else ""

    @property
    def checkpoint(self) -> Source:
        """The checkpoint it was built from."""
        return self.sources[CHECKPOINT]

    def of_branch(self, component: str, *, positive: bool) -> str:
        """What serves a branch of guidance: the component, or for the prompt's the one with LoRAs of its own."""
        own = component + POSITIVE
        return own if positive and own in self.components else component

    def pieces(self, component: str) -> tuple[str, ...]:
        """The names of a denoiser's head, body and tail, for the same branch of guidance; none where it is not cut."""
        names = [f"{component.removesuffix(POSITIVE)}.{piece}" for piece in PIECES]
        if not self.components.keys() >= {*names}:
            return ()
        return tuple(self.of_branch(name, positive=component.endswith(POSITIVE)) for name in names)

    def is_piece(self, component: str) -> bool:
        """Whether a component is a denoiser's head, body or tail."""
        whole, _, piece = component.removesuffix(POSITIVE).rpartition(".")
        return piece in PIECES and whole in self.components

    def for_both(self) -> Manifest:
        """The same without what is for the branch of the prompt alone."""
        own = {name: entry for name, entry in self.components.items() if name.endswith(POSITIVE)}
        components = {name: entry for name, entry in self.components.items() if name not in own}
        used = {file for entry in components.values() for file in entry.weights}
        gone = {file for entry in own.values() for file in (*entry.weights, *entry.graphs.values())} - used
        gone |= {file for engine in self.engines if engine.component in own for file in engine.files}
        return msgspec.structs.replace(
            self,
            components=components,
            files={name: record for name, record in self.files.items() if name not in gone},
            engines=tuple(engine for engine in self.engines if engine.component not in own),
            positive_loras=(),
        )

    def variants(self, component: str) -> tuple[str, ...]:
        """The names of a component's variants: other graphs over the same weights."""
        return tuple(name for name, entry in self.components.items() if entry.variant_of == component)


def _build_command(root: Path) -> str:
    """What makes a bundle of what was named in the place of one: a checkpoint that is here, or the name of one."""
    if root.exists():
        model, out = (root, f"{root}-bundle") if (root / "model_index.json").is_file() else ("MODEL", "BUNDLE")
    else:
        model, out = root, f"{root.name.lower()}-bundle"
    return shlex.join(["zimg-export", "build", "--model", str(model), "--out", str(out)])


def _instead(root: Path) -> str:
    """What to do about a folder that is no bundle: name the one that a hub's cache has in it, or build one."""
    found = sorted(path.parent for path in root.glob(f"snapshots/*/{MANIFEST}"))
    return f"name {found[-1]}" if found else f"make one with: {_build_command(root)}"


def read_manifest(root: Path) -> Manifest:
    """Read ``bundle.json``.

    Args:
        root: the bundle's folder.

    Raises:
        BundleError: there is none, or it is of a newer schema or no manifest.
    """
    path = root / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise BundleError(
                f"{path} is a link to {path.readlink()}, which is missing", "copy the bundle whole"
            ) from None
        hint = _instead(root)
        raise BundleError(f"{root} is not a bundle: it has no {MANIFEST}", hint) from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror})") from None
    try:
        found = msgspec.json.decode(data, type=dict[str, Any])
        version = found.get("schema_version")
        if isinstance(version, int | float) and version > SCHEMA_VERSION:
            raise BundleError(
                f"{root} has schema version {version}, and this zimgkit reads up to {SCHEMA_VERSION}",
                "upgrade zimgkit, or build the bundle again with this one",
            )
        manifest = msgspec.convert(_upgraded(found) if type(version) is int and version == 1 else found, Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is not a manifest zimgkit can read ({error})", "build the bundle again") from None
    for engine in manifest.engines:
        component = manifest.components.get(engine.component)
        if component is None or not component.graphs or not manifest.files.keys() >= set(engine.files):
            message = f"{path}: the engine {engine.file[:80]!r} is of no component with a graph, or in no list of files"
            raise BundleError(message, "build the bundle again")
    return manifest


def _upgraded(found: dict[str, Any]) -> dict[str, Any]:
    """A manifest of schema 1 as schema 2 has it. What is malformed stays so, for the decoder to say."""
    renamed = {"zimg_version": "zimgkit_version", "source": "sources"}
    new = {renamed.get(key, key): value for key, value in found.items()} | {"schema_version": SCHEMA_VERSION}
    new.setdefault("tasks", [TEXT_TO_IMAGE])
    if "sources" in new:
        new["sources"] = {CHECKPOINT: new["sources"]}
    if isinstance(quantization := new.get("quantization"), dict):
        own = {"unquantized" if key == "kept" else key: value for key, value in quantization.items()}
        new["quantization"] = own
    return new
