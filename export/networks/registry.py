"""The table of families, of their checkpoints' components, and of what these become in a bundle.

Everything about a family that is data stands in its row of :data:`FAMILIES`; what computes is in the modules that the
row names, which are imported when they are asked for: nothing here needs PyTorch or ONNX.

The defaults are those of the model cards and official scripts, in diffusers' convention of the guidance scale (1 is
none for Qwen-Image, 0 for Z-Image): https://github.com/Tongyi-MAI/Z-Image (Turbo: 8 steps, no guidance),
https://github.com/QwenLM/Qwen-Image (50 steps, true guidance 4.0, 1328x1328, a single space as the negative prompt).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib import import_module
from typing import TYPE_CHECKING, Any

import msgspec

from zimgkit.engines.bundle import TEXT_TO_IMAGE, Defaults, Layers, ReferencePictures
from zimgkit.engines.decoding import decoded
from zimgkit.engines.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from types import ModuleType

    from zimgkit.engines.bundle import Manifest
    from zimgkit.export.networks.parts import ControlNet, Part

Config = Mapping[str, Any]
"""A component's ``config.json``."""


@dataclass(frozen=True)
class CheckpointComponent:
    """One component of a checkpoint in the diffusers layout: a folder with its config and weights."""

    network: str
    """The module whose ``parts(config)`` says what it becomes, and ``checkpoint_shapes(config)`` what it holds."""
    unused: tuple[str, ...] = ()
    """Patterns of canonical names of tensors that no picture needs. ``{last}`` is the number of the last layer."""
    for_tasks: Mapping[str, str] = field(default_factory=dict)
    """Task -> ``module:function``, which says what it becomes for that in the place of the network's ``parts``.

    Tasks that take something of their own together are joined by a plus.
    """
    only_for: str = ""
    """The one task that needs it; all do where this is empty."""


@dataclass(frozen=True)
class KnownCheckpoint:
    """A checkpoint by name. Its short name is the last part of its hub id."""

    hub_id: str
    """The same on Hugging Face and on ModelScope; a name alone for what comes with zimgkit."""
    defaults: Defaults

    @property
    def name(self) -> str:
        """The short name, such as ``"Z-Image-Turbo"``."""
        return self.hub_id.rpartition("/")[2]


@dataclass(frozen=True)
class SmallEditor:
    """A small model that edits pictures."""

    references: ReferencePictures
    defaults: Defaults


@dataclass(frozen=True)
class FewStepLora:
    """A LoRA, or a series of them, that needs other settings than its checkpoint, known by its path."""

    pattern: str
    """Of the path of its file or repository, in any case of letters. A group ``steps`` says how many steps."""
    guidance_scale: float
    steps: int = 0
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """What it changes in the scheduler's config."""


@dataclass(frozen=True)
class TaskLora:
    """A LoRA, or a series of them, that is for a task, known by its path."""

    pattern: str
    """Of the path of its file or repository, in any case of letters."""
    tasks: tuple[str, ...] = ()
    references: Mapping[str, Any] = field(default_factory=dict)
    """What it changes in how the checkpoint takes pictures."""


@dataclass(frozen=True)
class ControlKind:
    """An architecture of ControlNets, known by what its files hold and never by their names."""

    marks: tuple[str, ...]
    """Tensors that its files have, and those of no other architecture."""
    net: str
    """``module:function`` that makes the :class:`.parts.ControlNet` of a file: called with the config of the
    checkpoint's transformer, the file's tensors and their shapes, and the config beside it, empty where there is none.
    """
    absent_if_zero: tuple[str, ...] = ()
    """Tensors that were never trained where they hold nothing but zeros: the file is read as if it had none."""


@dataclass(frozen=True)
class KnownControl:
    """A ControlNet on a hub, by the file."""

    hub_id: str
    file: str
    name: str
    """What it is called in a bundle where the user does not say."""
    checkpoint: str
    """The short name of the one that it is for."""
    modelscope: str = ""
    """Its id on ModelScope, where that is another."""

    @property
    def ids(self) -> tuple[str, ...]:
        """On all hubs."""
        return tuple(dict.fromkeys((self.hub_id, self.modelscope or self.hub_id)))

    def id_on(self, hub: str) -> str:
        """On ``"huggingface"`` or ``"modelscope"``."""
        return self.ids[-1] if hub == "modelscope" else self.hub_id


@dataclass(frozen=True)
class Family:
    """All that is known about a family before its networks are built."""

    name: str
    classes: tuple[str, ...]
    """What diffusers calls its pipeline and its transformer."""
    components: Mapping[str, CheckpointComponent]
    """The checkpoint's, in the order in which a picture needs them."""
    served: tuple[KnownCheckpoint, ...]
    carried: KnownCheckpoint
    """The small model that comes with zimgkit; it is on no hub."""
    base: str
    """The short name of the checkpoint whose defaults are those of others of the family."""
    demo: str
    """The module with the configs of a tiny checkpoint, ``CONFIGS``."""
    lora_modules: str
    """A pattern of what its modules are called in LoRAs, with underscores for dots."""
    signs: Mapping[str, str] = field(default_factory=dict)
    """A pattern that a canonical name of its transformers begins with -> the short name of the checkpoint that a file
    with it derives from, the base last."""
    shifts: Mapping[float, str] = field(default_factory=dict)
    """``shift`` in the scheduler's config -> the short name of the checkpoint that has it, where it is not the base."""
    few_step_loras: tuple[FewStepLora, ...] = ()
    task_loras: tuple[TaskLora, ...] = ()
    bases: Mapping[str, str] = field(default_factory=dict)
    """What diffusers calls a pipeline -> the short name of the checkpoint whose defaults others with it have."""
    editors: Mapping[str, ReferencePictures] = field(default_factory=dict)
    """What diffusers calls the pipelines of checkpoints that edit pictures -> how these take them."""
    small_editors: Mapping[str, SmallEditor] = field(default_factory=dict)
    """Short names of checkpoints that edit smaller pictures than their pipelines do, which are on no hub."""
    layered: Mapping[str, Layers] = field(default_factory=dict)
    """Likewise of those that take a picture apart."""
    loras: Mapping[str, str] = field(default_factory=dict)
    """Hub ids of LoRAs that people may take for checkpoints -> the short name of the checkpoint they are for."""
    processor: str = "processor"
    """The folder of such a checkpoint that says how pictures are prepared."""
    controls: Mapping[str, ControlKind] = field(default_factory=dict)
    """What its ControlNets are called by architecture -> how they are known."""
    known_controls: tuple[KnownControl, ...] = ()
    pictures_to_lora: str = ""
    """The module with the network that makes LoRAs of pictures, ``read_config`` and ``part``."""
    generators: Mapping[str, str] = field(default_factory=dict)
    """Short name of a checkpoint -> the file on a hub of that network for it; others have that of the base."""
    planned: tuple[str, ...] = ()
    """Hub ids of relatives that zimgkit will serve later."""
    tasks: tuple[str, ...] = (TEXT_TO_IMAGE, "image-to-image", "inpaint")
    """What its checkpoints can be asked for; of :data:`TASKS`."""


def _same_shift(factor: float) -> dict[str, Any]:
    """The same shift for every size."""
    return {"use_dynamic_shifting": True, "base_shift": math.log(factor), "max_shift": math.log(factor)}


NETWORKS = "zimgkit.export.networks"
EDIT = "edit"
"""The task of drawing from pictures and what a prompt says of them."""
CONTEXT = "context"
"""That of drawing what another picture controls: edges, depth, a pose."""
REGIONS = "regions"
"""That of prompts for regions of a picture."""
LAYERS = "layers"
"""That of taking a picture apart into layers with transparency."""
MEGAPIXEL = 1024 * 1024

Z_IMAGE = Family(
    "z-image",
    ("ZImagePipeline", "ZImageTransformer2DModel", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
    {
        # The pipeline reads the second-to-last hidden state.
        "text_encoder": CheckpointComponent(
            f"{NETWORKS}.text_encoder", ("visual.*", "lm_head.*", "norm.*", "layers.{last}.*")
        ),
        "transformer": CheckpointComponent(f"{NETWORKS}.z_image", (), {EDIT: f"{NETWORKS}.z_image_omni:edit_parts"}),
        "vae": CheckpointComponent(f"{NETWORKS}.autoencoder_kl", ("encoder.*", "quant_conv.*")),
        # What it pools is not read.
        "siglip": CheckpointComponent(f"{NETWORKS}.siglip", ("head.*",), only_for=EDIT),
    },
    served=(
        KnownCheckpoint("Tongyi-MAI/Z-Image-Turbo", Defaults(8, 0.0, 1024, 1024)),
        KnownCheckpoint("Tongyi-MAI/Z-Image", Defaults(50, 4.0, 1024, 1024)),
        # What its pipeline takes where a call does not say, but for the guidance, which is that of the base.
        KnownCheckpoint("Tongyi-MAI/Z-Image-Omni-Base", Defaults(50, 4.0, 1024, 1024)),
    ),
    bases={"ZImageOmniPipeline": "Z-Image-Omni-Base"},
    editors={
        "ZImageOmniPipeline": ReferencePictures(
            *("", MEGAPIXEL, MEGAPIXEL, 8),
            rope_interpolation=None,
            least=0,
            crops=True,
            shortest_side=64,
            most_aspect=8,
        ),
    },
    processor="siglip_processor",
    carried=KnownCheckpoint("zimg-tiny-z", Defaults(20, 0.5, 128, 128)),
    base="Z-Image",
    demo=f"{NETWORKS}.z_image_demo",
    lora_modules=r"(layers|(noise|context|siglip)_refiner)_\d+_(attention|feed_forward|adaLN)|(cap|siglip)_embedder|final_layer",
    signs={
        r"siglip_embedder\.1\.(base_layer\.)?weight": "Z-Image-Omni-Base",
        r"cap_embedder\.1\.(base_layer\.)?weight": "Z-Image",
    },
    shifts={3.0: "Z-Image-Turbo"},  # The base has 6.0.
    # Its model card: gives a LoRA that was trained on Z-Image-Turbo the settings of Turbo back.
    few_step_loras=(FewStepLora(r"Z-Image-Turbo-DistillPatch", 0.0, 8),),
    loras={"DiffSynth-Studio/Z-Image-Turbo-DistillPatch": "Z-Image-Turbo"},
    controls={
        "fun": ControlKind(
            ("control_all_x_embedder.2-1.weight", "control_layers.0.before_proj.weight"),
            f"{NETWORKS}.z_image_control:fun",
            absent_if_zero=("control_noise_refiner.0.before_proj.weight",),
        ),
    },
    known_controls=tuple(
        KnownControl(
            "alibaba-pai/Z-Image-Turbo-Fun-Controlnet-Union-2.1",
            f"Z-Image-Turbo-Fun-Controlnet-{file}.safetensors",
            name,
            "Z-Image-Turbo",
            "PAI/Z-Image-Turbo-Fun-Controlnet-Union-2.1",
        )
        for file, name in (("Union-2.1", "union"), ("Union-2.1-8steps", "union_8steps"), ("Tile-2.1-8steps", "tile"))
    ),
    pictures_to_lora=f"{NETWORKS}.z_image_i2l",
    generators={
        "Z-Image": "DiffSynth-Studio/Z-Image-i2L/model.safetensors",
        "Z-Image-Omni-Base": "DiffSynth-Studio/Z-Image-Omni-Base-i2L/model.safetensors",
    },
    planned=("Tongyi-MAI/Z-Image-Edit",),
)

QWEN_IMAGE = Family(
    "qwen-image",
    ("QwenImagePipeline", "QwenImageTransformer2DModel", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    {
        "text_encoder": CheckpointComponent(
            f"{NETWORKS}.text_encoder", ("visual.*", "lm_head.*"), {EDIT: f"{NETWORKS}.text_encoder:edit_parts"}
        ),
        "transformer": CheckpointComponent(
            f"{NETWORKS}.qwen_image",
            for_tasks={
                EDIT: f"{NETWORKS}.qwen_image_variants:edit_parts",
                CONTEXT: f"{NETWORKS}.qwen_image_variants:edit_parts",
                REGIONS: f"{NETWORKS}.qwen_image_variants:entity_parts",
                LAYERS: f"{NETWORKS}.qwen_image_variants:edit_parts",
                f"{EDIT}+{REGIONS}": f"{NETWORKS}.qwen_image_variants:edit_entity_parts",
                f"{CONTEXT}+{REGIONS}": f"{NETWORKS}.qwen_image_variants:edit_entity_parts",
            },
        ),
        "vae": CheckpointComponent(f"{NETWORKS}.qwen_image_vae", ("encoder.*", "quant_conv.*", "*.time_conv.*")),
    },
    served=(
        KnownCheckpoint("Qwen/Qwen-Image", Defaults(50, 4.0, 1328, 1328, " ")),
        # Its authors use a list of unwanted qualities, in Chinese, as the negative prompt; a space is neutral.
        KnownCheckpoint("Qwen/Qwen-Image-2512", Defaults(50, 4.0, 1328, 1328, " ")),
        # Their model cards.
        KnownCheckpoint("Qwen/Qwen-Image-Edit", Defaults(50, 4.0, 1024, 1024, " ")),
        KnownCheckpoint("Qwen/Qwen-Image-Edit-2509", Defaults(40, 4.0, 1024, 1024, " ")),
        KnownCheckpoint("Qwen/Qwen-Image-Edit-2511", Defaults(40, 4.0, 1024, 1024, " ")),
        KnownCheckpoint("Qwen/Qwen-Image-Layered", Defaults(50, 4.0, 640, 640, " ")),
    ),
    tasks=(TEXT_TO_IMAGE, "image-to-image", "inpaint", CONTEXT, REGIONS),
    # Their model cards, and examples/qwen_image of https://github.com/modelscope/DiffSynth-Studio.
    task_loras=(
        TaskLora(r"Qwen-Image-In-Context-Control-Union", (CONTEXT,)),
        TaskLora(r"Qwen-Image-EliGen|zimg-tiny-qwen-eligen", (REGIONS,)),
        TaskLora(r"Qwen-Image-Edit-Lowres-Fix", references={"auto_resize": False, "rope_interpolation": True}),
    ),
    bases={
        "QwenImageEditPipeline": "Qwen-Image-Edit",
        "QwenImageEditPlusPipeline": "Qwen-Image-Edit-2511",
        "QwenImageLayeredPipeline": "Qwen-Image-Layered",
    },
    editors={
        "QwenImageEditPipeline": ReferencePictures("", MEGAPIXEL, MEGAPIXEL, 1),
        "QwenImageEditPlusPipeline": ReferencePictures("Picture {number}: ", 384 * 384, MEGAPIXEL, 3),
    },
    small_editors={
        "zimg-tiny-qwen-edit": SmallEditor(
            ReferencePictures("Picture {number}: ", 96 * 96, 128 * 128, 3), Defaults(20, 1.5, 128, 128, " ")
        )
    },
    layered={"QwenImageLayeredPipeline": Layers()},
    carried=KnownCheckpoint("zimg-tiny-qwen", Defaults(20, 1.5, 128, 128, " ")),
    base="Qwen-Image",
    demo=f"{NETWORKS}.qwen_image_demo",
    signs={
        r"time_text_embed\.addition_t_embedding\.weight": "Qwen-Image-Layered",
        r"transformer_blocks\.0\.txt_mod\.1\.(base_layer\.)?weight": "Qwen-Image",
    },
    lora_modules=r"transformer_blocks_\d+_(attn_|img_m|txt_m)(?!.*attn\d)|txt_norm|txt_in",
    few_step_loras=(
        # https://github.com/ModelTC/Qwen-Image-Lightning, generate_with_diffusers.py: distilled at a shift of 3.
        FewStepLora(
            r"Qwen-Image(-2512)?-Lightning-(?P<steps>\d+)steps",
            1.0,
            scheduler=_same_shift(3) | {"shift": 1.0, "shift_terminal": None, "time_shift_type": "exponential"},
        ),
        # What comes with zimgkit is distilled likewise: docs/training.md.
        FewStepLora(
            r"zimg-tiny-qwen-(?P<steps>\d+)steps",
            1.0,
            scheduler=_same_shift(3) | {"shift": 1.0, "shift_terminal": None, "time_shift_type": "exponential"},
        ),
        # https://github.com/modelscope/DiffSynth-Studio, examples/qwen_image/model_inference: the ordinary schedule.
        FewStepLora(r"Qwen-Image-Distill-LoRA", 1.0, 15),
        # The same place, Qwen-Image-Distill-DMD2.py: exponential_shift_mu=math.log(2.5), the terminal sigma as it was.
        FewStepLora(r"qwen_image_distill_3step", 1.0, 3, _same_shift(2.5)),
    ),
    loras={
        "DiffSynth-Studio/Qwen-Image-Distill-LoRA": "Qwen-Image",
        "DiffSynth-Studio/Qwen-Image-EliGen": "Qwen-Image",
        "DiffSynth-Studio/Qwen-Image-EliGen-V2": "Qwen-Image",
        "DiffSynth-Studio/Qwen-Image-EliGen-Poster": "Qwen-Image",
        "DiffSynth-Studio/Qwen-Image-In-Context-Control-Union": "Qwen-Image",
        "DiffSynth-Studio/Qwen-Image-Edit-Lowres-Fix": "Qwen-Image-Edit",
    },
    controls={
        "blockwise": ControlKind(
            ("controlnet_blocks.0.x_rms.weight", "img_in.weight"), f"{NETWORKS}.qwen_image_control:blockwise"
        ),
        "residual": ControlKind(
            ("controlnet_blocks.0.weight", "controlnet_x_embedder.weight", "txt_in.weight"),
            f"{NETWORKS}.qwen_image_control:residual",
        ),
    },
    known_controls=tuple(
        KnownControl(
            f"DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-{name}", "model.safetensors", name.lower(), "Qwen-Image"
        )
        for name in ("Canny", "Depth", "Inpaint")
    )
    + tuple(
        KnownControl(
            f"InstantX/Qwen-Image-ControlNet-{name}", "diffusion_pytorch_model.safetensors", short, "Qwen-Image"
        )
        for name, short in (("Union", "union"), ("Inpainting", "inpainting"))
    ),
    planned=("DiffSynth-Studio/Qwen-Image-Distill-Full",),
)

PICTURE_ENCODERS = {
    "siglip": "DiffSynth-Studio/General-Image-Encoders/SigLIP2-G384/model.safetensors",
    "dinov3": "DiffSynth-Studio/General-Image-Encoders/DINOv3-7B/model.safetensors",
}
"""What describes pictures to those networks -> its file on a hub."""

FAMILIES = {row.name: row for row in (Z_IMAGE, QWEN_IMAGE)}
"""Family -> its row."""

WEIGHT_FILES = {
    "transformer": "diffusion_pytorch_model",
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
    "siglip": "model",
}
"""A checkpoint's component -> what the names of its weight files begin with."""


@dataclass(frozen=True)
class BundleComponent:
    """One component of a bundle."""

    source: str
    """The checkpoint's component that its tensors come from; in families that have one of its own for it, that."""
    takes_loras: bool = True
    is_quantized: bool = False
    """Whether its linears are quantized in a quantized bundle."""
    on_the_host: bool = False
    """Whether it has no graph, and the host computes with its tensors."""


COMPONENTS = {
    "vision_encoder": BundleComponent("text_encoder", takes_loras=False),
    "text_encoder": BundleComponent("text_encoder", is_quantized=True),
    "conditioner": BundleComponent("transformer"),
    "picture_conditioner": BundleComponent("transformer"),
    "modulation": BundleComponent("transformer", is_quantized=True, on_the_host=True),
    "denoiser": BundleComponent("transformer", is_quantized=True),
    "vae_decoder": BundleComponent("vae", takes_loras=False),
    "vae_encoder": BundleComponent("vae", takes_loras=False),
}
"""A bundle's component -> what it is. A family may lack some."""

TASKS: dict[str, tuple[str, ...]] = {
    TEXT_TO_IMAGE: (),
    "image-to-image": ("vae_encoder",),
    "inpaint": ("vae_encoder",),
    EDIT: ("vision_encoder", "picture_conditioner", "vae_encoder"),
    CONTEXT: ("vae_encoder",),
    REGIONS: (),
    LAYERS: ("vae_encoder",),
}
"""What a bundle can be asked for -> the components it needs for that, beside those of every picture."""

QUANTIZED = tuple(name for name, component in COMPONENTS.items() if component.is_quantized)
"""What is quantized, where a bundle has it: nearly all the weights, and nearly all the work."""
QUANTIZED_GRAPHS = tuple(name for name in QUANTIZED if not COMPONENTS[name].on_the_host)
"""Those of them that have a graph."""
LORA_SOURCES = {name: component.source for name, component in COMPONENTS.items() if component.takes_loras}
"""Components that LoRAs can change -> the checkpoint's component they come from."""


def row(family: str) -> Family:
    """A family's row.

    Raises:
        CheckpointError: no such family.
    """
    if family not in FAMILIES:
        raise CheckpointError(f"no family is called {family!r}", f"zimgkit serves {', '.join(FAMILIES)}")
    return FAMILIES[family]


def module(family: str, component: str) -> ModuleType:
    """The module of a checkpoint's component, which needs PyTorch."""
    return import_module(row(family).components[component].network)


def tasks_of(family: str, pipeline: str, asked: Collection[str]) -> tuple[str, ...]:
    """What a bundle can be asked for that is built for some tasks: what its checkpoint is for, and those.

    Args:
        family: its name.
        pipeline: what diffusers calls the checkpoint's pipeline.
        asked: names of tasks.

    Raises:
        UsageError: a task that there is not, or that this checkpoint has not.
    """
    own = row(family)
    known, first = own.tasks, own.tasks[:1]
    if pipeline in own.layered:
        known = first = (LAYERS,)
    elif taken := own.editors.get(pipeline):
        first = (EDIT,) if taken.least else (TEXT_TO_IMAGE, EDIT)
        known = (*first, *(task for task in own.tasks if task == REGIONS))
    for task in asked:
        if task not in known:
            raise UsageError(f"{task!r} is no task of this checkpoint", f"choose of {', '.join(known)}")
    return tuple(task for task in known if task in first or task in asked)


def sources(family: str, tasks: Collection[str] = ()) -> tuple[str, ...]:
    """The components of a checkpoint that these tasks need, or every picture."""
    components = row(family).components.items()
    return tuple(name for name, own in components if not own.only_for or own.only_for in tasks)


def is_needed(component: str, tasks: Collection[str]) -> bool:
    """Whether a bundle's component is needed for these tasks, or for every picture."""
    needing = {task for task, components in TASKS.items() if component in components}
    return not needing or not needing.isdisjoint(tasks)


def parts(family: str, component: str, config: Config, tasks: Collection[str] = ()) -> dict[str, Part]:
    """What a checkpoint's component becomes, with what these tasks may not need.

    Args:
        family: its name.
        component: of :func:`sources`.
        config: the component's own.
        tasks: what the bundle is for beside pictures from text.

    Returns:
        The bundle's component -> its part.

    Raises:
        CheckpointError: the config is of no network that zimgkit implements.
    """
    own = row(family).components[component]
    places = [place for joined, place in own.for_tasks.items() if set(joined.split("+")) <= set(tasks)]
    places = places or [f"{own.network}:parts"]
    found: dict[str, Part] = {}
    for place in dict.fromkeys(places):
        name, _, function = place.partition(":")
        for key, part in getattr(import_module(name), function)(config).items():
            variants = {**found[key].variants, **part.variants} if key in found else part.variants
            found[key] = replace(part, variants=variants)
    return found


def control_net(
    family: str, config: Config, shapes: Mapping[str, tuple[int, ...]], own: Config, where: str
) -> ControlNet:
    """The ControlNet that a file of weights is.

    Args:
        family: of the checkpoint that it shall control.
        config: of that one's transformer.
        shapes: the file's tensors, by their names, and their shapes; see :attr:`ControlKind.absent_if_zero`.
        own: the config beside the file; empty where there is none.
        where: what to call the file in messages.

    Raises:
        CheckpointError: it is none, or one of another family or of another size.
    """
    kinds = [(name, *item) for name, each in FAMILIES.items() for item in each.controls.items()]
    found = [(of, kind) for of, kind, known in kinds if all(mark in shapes for mark in known.marks)]
    if not found:
        what = "it is a LoRA: name it with --lora" if _is_lora(shapes) else "fetch it again, or name another file"
        raise CheckpointError(f"{where} is no ControlNet that zimgkit knows", what)
    if family not in (of for of, _ in found):
        raise CheckpointError(f"{where} is a ControlNet of {found[0][0]}, and this is {family}", "name one of its own")
    kind = next(kind for of, kind in found if of == family)
    name, _, function = FAMILIES[family].controls[kind].net.partition(":")
    try:
        net: ControlNet = getattr(import_module(name), function)(config, shapes, own)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.message}", error.hint) from None
    return net


def _is_lora(names: Collection[str]) -> bool:
    return any(part in name for name in names for part in (".lora_", "lora_A", "lora_down", ".alpha"))


class _Depth(msgspec.Struct, frozen=True):
    num_hidden_layers: int = 0


def is_unused(family: str, component: str, config: Config, name: str) -> bool:
    """Whether a tensor is one that no picture needs.

    Args:
        family: its name.
        component: the checkpoint's.
        config: the component's own, or the part of it that describes the language model.
        name: the tensor's canonical name, or a part of it that ends with a dot.
    """
    described = config.get("text_config") or config
    last = decoded(described, _Depth, f"{component}/config.json", CheckpointError).num_hidden_layers - 1
    return any(fnmatchcase(name, pattern.format(last=last)) for pattern in row(family).components[component].unused)


def family_of_class(name: str) -> str | None:
    """The family whose pipeline or transformer diffusers calls so."""
    return next((row.name for row in FAMILIES.values() if name in (*row.classes, *row.editors, *row.layered)), None)


def references_of(family: str, pipeline: str, name: str) -> ReferencePictures | None:
    """How a checkpoint takes pictures to edit; None where it takes none.

    Args:
        family: its family.
        pipeline: what diffusers calls its pipeline.
        name: its short name.
    """
    own = row(family)
    taken, small = own.editors.get(pipeline), own.small_editors.get(name)
    return small.references if taken and small else taken


def pipeline_of(manifest: Manifest) -> str:
    """What diffusers calls the pipeline that draws as a bundle does."""
    own, taken = row(manifest.family), manifest.references
    if manifest.layers and own.layered:
        return next(iter(own.layered))
    if taken:
        alike = (
            name
            for name, one in own.editors.items()
            if (one.introduction, one.most) == (taken.introduction, taken.most)
        )
        return next(alike, own.classes[0])
    return own.classes[0]


def is_carried(checkpoint: str) -> bool:
    """Whether this is the name of a small model that comes with zimgkit; those know shapes and colours alone."""
    return any(row.carried.name == checkpoint for row in FAMILIES.values())
