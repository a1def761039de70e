"""The bundle on disk: its manifest, how it is read and verified, how it is written so that it is whole or absent.

Knows files and hashes, and nothing of any model.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from zimg.engines import safetensors, verified
from zimg.engines.errors import BundleError, OutputError
from zimg.engines.files import beside, replacing

SCHEMA_VERSION = 1
MANIFEST = "bundle.json"
CHUNK = 16 << 20


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output of a graph: element type, and sides as numbers or the names of free sides."""

    dtype: str
    shape: tuple[int | str, ...]


class Component(msgspec.Struct, frozen=True, omit_defaults=True):
    """One part of the model: its graphs, its weights, what goes in and what comes out."""

    weights: tuple[str, ...]
    """Safetensors files of the bundle that hold its tensors; where several have a name, the last one counts."""
    graphs: dict[str, str] = {}
    """Element type the graph computes in -> ONNX file. All of them point into the same weights."""
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


Range = tuple[int, int, int]
"""Of a free side: the least, the likeliest and the most it may be."""


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
    """Each a set of ranges it serves, by free side; sides without a range take any length."""
    memory_bytes: int = 0
    """Device memory it needs beside the plan's own bytes, for the largest shapes, as the compiler says."""
    weight_streaming_budget: int | None = None
    """Bytes of weights kept on the device, the rest being streamed to it; all are kept when None."""
    refittable: bool = False
    """Whether it can take other weights than it was compiled from."""
    refit: Refit | None = None
    stripped: bool = False
    """Whether the plan has no weights, and takes the bundle's when it is loaded."""
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
    """Where a bundle came from."""

    model: str
    """As the user named it."""
    revision: str | None = None
    files: dict[str, int] = {}
    """The checkpoint's weight files and their sizes in bytes."""


class TextConfig(msgspec.Struct, frozen=True):
    """How a prompt becomes token ids, and which of the encoder's rows are kept."""

    prefix: str
    suffix: str
    drop: int
    """Leading rows of the encoder's output that belong to the template and are dropped."""
    max_tokens: int
    """Token ids past this many are cut, template included."""
    max_sequence_length: int
    """Rows kept after the drop, unless the caller asks for another number."""


class Defaults(msgspec.Struct, frozen=True):
    """What a call uses where the caller says nothing: the checkpoint's own recommendation."""

    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    negative_prompt: str | None = None


class Quantization(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a bundle's linears were quantized."""

    precision: str
    """``"fp8"``, ``"int8"``, ``"int8-weights"`` or ``"int4-weights"``."""
    kept: dict[str, dict[str, str]] = {}
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


class Difference(msgspec.Struct, frozen=True):
    """How far pictures and what leads to them are from those of the same checkpoint in float32."""

    velocity_relative: tuple[float, ...]
    """By step: the norm of what the denoiser gives too much or too little over that of what it should give, from the
    float32 run's latents; the mean over pictures and branches of guidance."""
    velocity_cosine: tuple[float, ...]
    """Likewise the cosine; the least."""
    latents_relative: tuple[float, ...]
    """By step: of the latents after it, each run on its own latents; the mean over pictures."""
    latents_cosine: tuple[float, ...]
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

    @property
    def cosine(self) -> float:
        """The least cosine of a velocity."""
        return min(self.difference.velocity_cosine)


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
    zimg_version: str
    family: str
    name: str
    """The checkpoint's short name, for people."""
    precision: str
    """The element type of the weights, of those that are not quantized."""
    source: Source
    text: TextConfig
    defaults: Defaults
    scheduler: dict[str, Any]
    config: dict[str, dict[str, Any]]
    """The checkpoint's own config per component, which the host side reads sizes and constants from."""
    components: dict[str, Component]
    files: dict[str, FileRecord]
    """Every file of the bundle but the manifest itself."""
    tools: dict[str, str] = {}
    """Versions of what built it."""
    engines: tuple[CompiledEngine, ...] = ()
    """What was compiled from it."""
    loras: tuple[MergedLora, ...] = ()
    """What was merged into its weights."""
    base_defaults: Defaults | None = None
    """The defaults without LoRAs, where those or the user replaced them."""
    base_scheduler: dict[str, Any] | None = None
    """Likewise the scheduler."""
    quantization: Quantization | None = None
    cost: Cost | None = None
    """What the precision costs, where that was measured."""


@dataclass(frozen=True)
class Bundle:
    """An open bundle. Use :meth:`open`."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
        """Read a bundle's manifest and check its files against it.

        Hashes are computed on the first opening, and again only for files whose size or times changed since.

        Args:
            path: the bundle's folder.
            verify: whether to check sizes and hashes at all.

        Raises:
            BundleError: no bundle there, a newer schema, a missing or changed file, or a path that leaves the bundle.
        """
        root = Path(path)
        bundle = cls(root.resolve(), _read_manifest(root))
        for name in bundle.manifest.files:
            bundle.file(name)
        if verify:
            bundle.verify()
        return bundle

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files.

        Raises:
            BundleError: the name leads out of the bundle, or the manifest does not list it, or it is missing.
        """
        pure, manifest = PurePosixPath(name), self.root / MANIFEST
        path = self.root / pure
        try:
            leaves = pure.is_absolute() or ".." in pure.parts or "\\" in name
            leaves = leaves or not path.resolve().is_relative_to(self.root)
            present = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:
            # Too long a name, a null byte, links in a circle.
            message = f"{manifest} names {name!r}, which cannot be opened ({error})"
            raise BundleError(message, "do not trust it") from None
        if leaves:
            raise BundleError(f"{manifest} names {name!r}, which leads out of the bundle", "do not trust it")
        if name not in self.manifest.files:
            raise BundleError(f"{manifest} does not list {name!r}", "build the bundle again")
        if not present:
            raise BundleError(f"{path} is missing", "copy or build the bundle again")
        return path

    def component(self, name: str) -> Component:
        """One component's entry in the manifest.

        Raises:
            BundleError: the bundle has no such component.
        """
        try:
            return self.manifest.components[name]
        except KeyError:
            known = ", ".join(self.manifest.components)
            raise BundleError(f"{self.root} has no component {name!r}, only {known}") from None

    @cached_property
    def _headers(self) -> dict[str, dict[str, safetensors.TensorInfo]]:
        return {}

    def tensors(self, component: str) -> dict[str, safetensors.TensorInfo]:
        """Where the tensors in a component's weight files lie, by name."""
        found: dict[str, safetensors.TensorInfo] = {}
        for name in self.component(component).weights:
            if name not in self._headers:
                self._headers[name] = safetensors.read_header(self.file(name))
            found.update(self._headers[name])
        return found

    def verify(self, *, afresh: bool = False) -> None:
        """Check every file's size and hash.

        Args:
            afresh: hash every byte again, even of files seen unchanged since an earlier check.

        Raises:
            BundleError: naming the first file that is not what the manifest says.
        """
        paths = {name: self.file(name) for name in self.manifest.files}
        for name, path in paths.items():
            size, expected = path.stat().st_size, self.manifest.files[name].size
            if size != expected:
                raise BundleError(f"{path} has {size:,} of {expected:,} bytes", "copy or build the bundle again")
        fresh = [name for name, path in paths.items() if afresh or not verified.is_known(path, self._hash(name))]
        # Taken before the bytes are read: what changes meanwhile is read again the next time.
        states = [verified.state(paths[name]) for name in fresh]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            hashes = pool.map(lambda name: sha256(paths[name]), fresh)
            for name, state, digest in zip(fresh, states, hashes, strict=True):
                if digest != self._hash(name):
                    raise BundleError(
                        f"{paths[name]} was changed: its hash is not the manifest's", "copy or build the bundle again"
                    )
                verified.remember(paths[name], digest, state)

    def _hash(self, name: str) -> str:
        return self.manifest.files[name].sha256

    def trust(self) -> None:
        """Take the files for verified: whoever wrote them has just hashed them."""
        for name, record in self.manifest.files.items():
            path = self.file(name)
            verified.remember(path, record.sha256, verified.state(path))

    def engines(self, component: str, backend: str) -> list[CompiledEngine]:
        """What was compiled from a component for a backend."""
        return [e for e in self.manifest.engines if e.component == component and e.backend == backend]

    def source_hash(self, component: str) -> str:
        """A hash of a component's weights and of its graph in the bundle's precision: what engines are made from."""
        graph = next(iter(self.component(component).graphs.values()))
        return hashlib.sha256(f"{self._hash(graph)}{self.content_hash(component)}".encode()).hexdigest()

    def content_hash(self, component: str) -> str:
        """A hash of all weights of a component, for keys of caches."""
        joined = "".join(self._hash(name) for name in self.component(component).weights)
        return hashlib.sha256(joined.encode()).hexdigest()


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        hint = "make one with: zimg-export build --model MODEL --out BUNDLE"
        raise BundleError(f"{root} is not a bundle: it has no {MANIFEST}", hint) from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror})") from None
    try:
        version = msgspec.json.decode(data, type=dict[str, Any]).get("schema_version")
        if isinstance(version, int | float) and version > SCHEMA_VERSION:
            raise BundleError(
                f"{root} has schema version {version}, and this zimg reads up to {SCHEMA_VERSION}",
                "upgrade zimg, or build the bundle again with this one",
            )
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is not a manifest zimg can read ({error})", "build the bundle again") from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write ``bundle.json`` into a bundle's folder, indented for people; one that is there is replaced in one step."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    with replacing(root / MANIFEST) as part:
        part.write_bytes(text + b"\n")


def record_files(root: Path) -> dict[str, FileRecord]:
    """Hash every file below a folder but its manifest."""
    paths = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
    paths.pop(MANIFEST, None)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(sha256, paths.values())
        return {
            name: FileRecord(path.stat().st_size, digest)
            for (name, path), digest in zip(paths.items(), digests, strict=True)
        }


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False, mark: str = MANIFEST) -> Iterator[Path]:
    """Give a new folder beside ``target`` to write into; rename it to ``target`` at the end, or leave nothing.

    Args:
        target: the folder that shall exist afterwards.
        overwrite: replace a folder that exists, if it is one of ours or empty.
        mark: the file by which one of ours is known.

    Raises:
        OutputError: the target exists, is no bundle, or cannot be written, or the disk is full.
    """
    work = beside(target, "part")
    made: list[Path] = []
    try:
        _check_target(target, overwrite, mark)
        made = [parent for parent in target.parents if not parent.exists()]
        work.mkdir(parents=True)
        yield work
        _check_target(target, overwrite, mark)
        _move(work, target)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        message = f"{target} cannot be written ({error.strerror or error}{place})"
        raise OutputError(message, _write_hint(error)) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # Stays where the target is in it.


def _check_target(target: Path, overwrite: bool, mark: str) -> None:
    if target.is_symlink():
        raise OutputError(f"{target} is a link", "name the folder itself")
    if not target.exists():
        return
    if not (target / mark).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} exists and has no {mark}", "name another folder")
    if not overwrite:
        raise OutputError(f"{target} exists already", "name another folder, or replace it with --overwrite")


def _move(work: Path, target: Path) -> None:
    """Rename a finished folder to its target. A bundle that is there is put aside first, and back if that fails."""
    old = beside(target, "old")
    with contextlib.suppress(FileNotFoundError):
        target.rename(old)
    try:
        work.rename(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_hint(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, or name a folder on another disk"
    return "check the path and its rights"
