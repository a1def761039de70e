"""The parameters of a call: the one list that the command line, the Python call, pictures and servers are derived from.

Names are those of diffusers' pipelines; DiffSynth's are accepted where they differ.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from zimgkit.engines.errors import UsageError

MULTIPLE = 16
"""A token is a patch of 16 x 16 pixels."""
RECOMMENDED = "the checkpoint's"
MAX_CHARACTERS = 100_000
"""A longer prompt is a mistake: no tokenizer makes fewer than a thousand tokens of it."""


class Picture:
    """The type of parameters that are pictures: what :func:`.pictures.reading.read_picture` takes."""


class ControlPicture:
    """The type of the parameter that says which ControlNet acts with which pictures, see :mod:`.controls`."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a call."""

    name: str
    type: type
    """``str``, ``int``, ``float``, ``bool``, ``tuple`` for several numbers, :class:`Picture` or
    :class:`ControlPicture`."""
    help: str
    default: str = ""
    """What is used where it is not given, in words; empty where the value is the bundle's own recommendation."""
    low: float = -math.inf
    high: float = math.inf
    multiple: int = 1
    choices: tuple[str | int, ...] = ()
    option: str = ""
    """What the command line calls it; empty where it does not have it."""
    key: str = ""
    """What the text in a picture calls it; empty where it has a form of its own there, or none."""
    recorded: bool = False
    """Whether a picture carries it, so that it can be drawn again."""
    several: bool = False
    """Whether the command line takes it several times."""


PARAMETERS = (
    Parameter("prompt", str, "What to draw.", option="prompt", recorded=True),
    Parameter(
        "negative_prompt",
        str,
        "What to guide away from.",
        "the checkpoint's recommendation",
        option="negative-prompt",
        recorded=True,
    ),
    Parameter(
        "height",
        int,
        "The height in pixels, a multiple of 16.",
        low=16,
        multiple=MULTIPLE,
        option="height",
        recorded=True,
    ),
    Parameter(
        "width", int, "The width in pixels, a multiple of 16.", low=16, multiple=MULTIPLE, option="width", recorded=True
    ),
    Parameter(
        "num_inference_steps",
        int,
        "How many denoising steps to take.",
        low=1,
        high=1000,
        option="num-inference-steps",
        key="Steps",
        recorded=True,
    ),
    Parameter("sigmas", tuple, "The noise levels, before the shift.", "equal steps", low=0, high=1, recorded=True),
    Parameter(
        "guidance_scale",
        float,
        "How strongly to follow the prompt, as diffusers counts it for this family.",
        low=-1000,
        high=1000,
        option="guidance-scale",
        key="Guidance scale",
        recorded=True,
    ),
    Parameter("true_cfg_scale", float, "Another name of guidance_scale.", "guidance_scale", low=-1000, high=1000),
    Parameter(
        "cfg_scale",
        float,
        "The guidance scale as DiffSynth counts it; 1 is off.",
        "the guidance scale",
        low=-1000,
        high=1000,
        option="cfg-scale",
        key="CFG scale",
        recorded=True,
    ),
    Parameter(
        "cfg_normalization",
        float,
        "A bound on the guided velocity's norm, in norms of the unguided; 0 is none.",
        "0",
        low=0,
        high=1e6,
        option="cfg-normalization",
        key="CFG normalization",
        recorded=True,
    ),
    Parameter(
        "cfg_truncation",
        float,
        "Guidance is off once 1 - sigma exceeds this number.",
        "1",
        low=0,
        high=1e6,
        option="cfg-truncation",
        key="CFG truncation",
        recorded=True,
    ),
    Parameter(
        "guidance_low",
        float,
        "Guidance is off below this noise level (sigma).",
        "0",
        low=0,
        high=1,
        option="guidance-low",
        key="Guidance low",
        recorded=True,
    ),
    Parameter(
        "guidance_high",
        float,
        "Guidance is off above this noise level (sigma).",
        "1",
        low=0,
        high=1,
        option="guidance-high",
        key="Guidance high",
        recorded=True,
    ),
    Parameter(
        "cache",
        str,
        "Which steps are computed in full, the others taking over most of the last full one: off, balanced, fast, "
        "dynamic or dynamic:0.12, a 1 or a 0 for each step, or the name of a mask in the bundle.",
        "off",
        option="cache",
        key="Cache",
        recorded=True,
    ),
    Parameter(
        "cache_negative",
        str,
        "Which steps of the negative prompt's branch are computed in full, said as for cache, without dynamic.",
        "as cache",
        option="cache-negative",
        key="Cache negative",
        recorded=True,
    ),
    Parameter(
        "cache_order",
        int,
        "What other steps take over: 0 what the last full one gave, 1 what the last two extrapolate to.",
        "1, or the mask's own",
        choices=(0, 1),
        low=0,
        high=1,
        option="cache-order",
        key="Cache order",
        recorded=True,
    ),
    Parameter(
        "cache_reuse",
        str,
        "What that is: the residual, for which the denoiser's first block is computed in all steps, or its velocity.",
        "residual where the bundle's denoiser is cut",
        choices=("residual", "velocity"),
        option="cache-reuse",
        key="Cache reuse",
        recorded=True,
    ),
    Parameter(
        "num_images_per_prompt",
        int,
        "How many pictures to draw of each prompt.",
        "1",
        low=1,
        high=1000,
        option="num-images",
    ),
    Parameter(
        "seed",
        int,
        "The seed of the noise.",
        "a random one, which is told",
        low=-(2**63),
        high=2**64 - 1,
        option="seed",
        key="Seed",
        recorded=True,
    ),
    Parameter(
        "max_sequence_length",
        int,
        "How many tokens of a prompt are read.",
        low=1,
        option="max-sequence-length",
        key="Max sequence length",
        recorded=True,
    ),
    Parameter(
        "image",
        Picture,
        "A picture to start from, or to edit; a bundle that edits may take several.",
        "none",
        option="image",
        recorded=True,
        several=True,
    ),
    Parameter(
        "input_image",
        Picture,
        "Another name of image; beside it, where a bundle edits: the picture to start from.",
        "the first image where there is a strength or a mask",
        option="input-image",
        recorded=True,
    ),
    Parameter(
        "strength",
        float,
        "How much of the picture is drawn anew, from 0 to 1, as diffusers counts it: steps are left out.",
        "what the reference pipeline takes",
        low=0,
        high=1,
        option="strength",
        key="Denoising strength",
        recorded=True,
    ),
    Parameter(
        "denoising_strength",
        float,
        "How much of it is drawn anew, as DiffSynth counts it: all steps are taken, from a lower noise level on.",
        "strength",
        low=0,
        high=1,
        option="denoising-strength",
        key="DiffSynth denoising strength",
        recorded=True,
    ),
    Parameter(
        "mask_image",
        Picture,
        "What of the picture is drawn anew: white; what is black is kept.",
        "all of it",
        option="mask",
        recorded=True,
    ),
    Parameter(
        "mask_blur",
        float,
        "How far the mask's edges are blurred, in pixels.",
        "0",
        low=0,
        high=1024,
        option="mask-blur",
        key="Mask blur",
        recorded=True,
    ),
    Parameter(
        "inpaint_blur_size",
        int,
        "Blur the mask as DiffSynth does, over so many latent pixels on each side.",
        "none",
        low=1,
        high=512,
        option="inpaint-blur-size",
        key="Inpaint blur size",
        recorded=True,
    ),
    Parameter(
        "inpaint_blur_sigma",
        float,
        "The standard deviation of that blur, in latent pixels.",
        "none",
        low=1e-3,
        high=512,
        option="inpaint-blur-sigma",
        key="Inpaint blur sigma",
        recorded=True,
    ),
    Parameter(
        "keep_unmasked",
        bool,
        "Put the picture's own pixels back where the mask keeps them.",
        "no, as diffusers",
        option="keep-unmasked/--redraw-unmasked",
        recorded=True,
    ),
    Parameter(
        "edit_image_auto_resize",
        bool,
        "Bring pictures to edit to the sizes that the checkpoint was trained on.",
        option="edit-image-auto-resize/--no-edit-image-auto-resize",
        recorded=True,
    ),
    Parameter(
        "edit_image_area",
        int,
        "What larger pictures to edit are brought to, in pixels, where a bundle reduces these alone.",
        "height x width where both are given, else the checkpoint's",
        low=256,
        high=1 << 26,
        recorded=True,
    ),
    Parameter(
        "edit_rope_interpolation",
        bool,
        "Let pictures to edit span what is drawn, whatever their size.",
        option="edit-rope-interpolation/--no-edit-rope-interpolation",
        recorded=True,
    ),
    Parameter(
        "context_image",
        Picture,
        "A picture that controls what is drawn, of the kind that the bundle's LoRA was trained on.",
        "none",
        option="context-image",
        recorded=True,
    ),
    Parameter("eligen_entity_prompts", str, "What to draw in each region.", "none", recorded=True, several=True),
    Parameter("eligen_entity_masks", Picture, "Where each region is: white.", "none", recorded=True, several=True),
    Parameter(
        "eligen_enable_on_negative",
        bool,
        "Let the negative prompt stand for each region as well.",
        "no",
        option="eligen-enable-on-negative",
        recorded=True,
    ),
    Parameter(
        "controls",
        ControlPicture,
        "Which ControlNets act, each a mapping with its name, image, scale, start, end, mask and inpaint_image.",
        "none",
        recorded=True,
        several=True,
    ),
    Parameter(
        "layers",
        int,
        "Into how many layers a picture is taken apart.",
        low=1,
        high=64,
        option="layers",
        key="Layers",
        recorded=True,
    ),
    Parameter(
        "resolution",
        int,
        "How large the layers are: the square root of their pixels.",
        choices=(640, 1024),
        option="resolution",
    ),
    Parameter(
        "output_type",
        str,
        "PIL images, arrays or torch tensors of 0 ... 1, or latents.",
        '"pil"',
        choices=("pil", "np", "pt", "latent"),
    ),
)
BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}

TENSORS = {
    "generator": "a torch generator, or one for each picture, whose ``initial_seed()`` is the seed",
    "latents": "noise to start from instead of the seed's, in the reference pipeline's own form",
    "prompt_embeds": "rows of the text encoder instead of a prompt",
    "negative_prompt_embeds": "rows of the text encoder instead of a negative prompt",
    "edit_image": "DiffSynth's name of image where a bundle edits",
    "inpaint_mask": "mask_image, resized and blended as DiffSynth does it",
    "control_image": "a picture for each of the bundle's ControlNets, in their order or by name",
    "control_images": "another name of control_image",
    "control_mask": "likewise masks, of nets that take some: white where the picture is drawn anew",
    "controlnet_conditioning_scale": "how strongly they act, one for all or one for each",
    "control_guidance_start": "the share of the steps after which they act, one for all or one for each",
    "control_guidance_end": "the share of the steps up to which they act, one for all or one for each",
    "controlnet_inputs": "DiffSynth's ControlNetInputs: controls whose start and end count down from 1 to 0",
    "blockwise_controlnet_inputs": "another name of controlnet_inputs",
    "layer_input_image": "DiffSynth's name of image where a bundle takes it apart",
    "layer_num": "DiffSynth's name of layers",
    "cfg_normalize": "cfg_normalization of 1, as diffusers says it of layers",
}
"""What only a call in Python can take."""

VAE_TILING = ("auto", "on", "off")
"""Encode and decode in tiles where memory is short for the whole, always, or never."""
INSTEAD = {
    "batch_size": "num_images_per_prompt",
    "cfg": "cfg_scale",
    "cfg_interval": "guidance_low and guidance_high",
    "cfg_trunc_ratio": "cfg_truncation",
    "guidance": "guidance_scale",
    "guidance_interval": "guidance_low and guidance_high",
    "guidance_start": "guidance_high, which is a noise level",
    "guidance_stop": "guidance_low, which is a noise level",
    "n": "num_images_per_prompt",
    "num_images": "num_images_per_prompt",
    "num_steps": "num_inference_steps",
    "size": "height and width",
    "steps": "num_inference_steps",
    "timesteps": "sigmas, which are noise levels from 1 to 0",
    "callback": "callback_on_step_end",
    "callback_steps": "callback_on_step_end, which is called after every step",
    "attention_kwargs": "a bundle with LoRAs merged: zimg-export swap-lora",
    "cross_attention_kwargs": "a bundle with LoRAs merged: zimg-export swap-lora",
    "joint_attention_kwargs": "a bundle with LoRAs merged: zimg-export swap-lora",
    "prompt_embeds_mask": "prompt_embeds without the rows that the mask leaves out",
    "negative_prompt_embeds_mask": "negative_prompt_embeds without the rows that the mask leaves out",
    "rand_device": "seed, whose noise is always that of a generator on the CPU",
    "tiled": "vae_tiling of Pipeline.open, or --vae-tiling",
    "tile_size": "vae_tiling of Pipeline.open, or --vae-tiling; tiles have the family's own size",
    "tile_stride": "vae_tiling of Pipeline.open, or --vae-tiling; tiles have the family's own size",
    "vram_limit": "memory of Pipeline.open, or --memory",
    "torch_dtype": "a bundle of another precision: zimg-export build --precision",
    "use_en_prompt": "a prompt: none is written for a picture here",
    "exponential_shift_mu": "sigmas, or a bundle with another scheduler",
}
"""Arguments of other pipelines -> what serves instead."""


def checked(parameter: Parameter, value: Any, *, high: float | None = None) -> Any:
    """A value of one parameter, as its type, within its range.

    Args:
        parameter: which.
        value: what was given.
        high: a lower bound on its largest value than its own.

    Raises:
        UsageError: it is of another type or out of range; naming the parameter, and what it may be.
    """
    highest = parameter.high if high is None else high
    if parameter.type is int:
        value = _multiple(parameter, _integer(parameter.name, value, parameter.low, highest), highest)
    if parameter.type is float:
        return _number(parameter.name, value, parameter.low, highest)
    if parameter.type is tuple:
        return _numbers(parameter, value)
    if parameter.type is bool and not isinstance(value, bool):
        raise UsageError(f"{parameter.name} is {value!r}", "give True or False")
    if parameter.choices and value not in parameter.choices:
        raise UsageError(f"{parameter.name} is {value!r}", f"choose one of {', '.join(map(str, parameter.choices))}")
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    """A text, or several.

    Raises:
        UsageError: it is neither, or one is too long.
    """
    values = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not values or not all(isinstance(entry, str) for entry in values):
        raise UsageError(f"{name} must be a text, or a list of texts")
    longest = max(len(entry) for entry in values)
    if longest > MAX_CHARACTERS:
        raise UsageError(f"{name} has {longest:,} characters", f"give at most {MAX_CHARACTERS:,}")
    return values


def refuse_unknown(given: Iterable[str], known: Collection[str]) -> None:
    """Refuse arguments that there are not, and name what serves instead.

    Raises:
        UsageError: naming the first.
    """
    for name in given:
        if name in known:
            continue
        if name in INSTEAD:
            raise UsageError(f"there is no argument {name!r}", f"use {INSTEAD[name]}")
        close = difflib.get_close_matches(name, known, n=1)
        raise UsageError(f"there is no argument {name!r}", f"did you mean {close[0]}?" if close else "leave it out")


def document(names: Iterable[str]) -> str:
    """The named parameters as the ``Args`` of a docstring."""
    lines = []
    for name in names:
        parameter = BY_NAME.get(name)
        if parameter is None:
            lines.append(f"    {name}: {TENSORS[name]}.")
        else:
            lines.append(f"    {name}: {parameter.help} [default: {parameter.default or RECOMMENDED}]")
    return "\n".join(lines)


def _multiple(parameter: Parameter, number: int, highest: float) -> int:
    step = parameter.multiple
    if number % step:
        near = max(step, round(number / step) * step)
        raise UsageError(f"{parameter.name} is {number}, not a multiple of {step}", f"the nearest that is: {near}")
    return number


def _integer(name: str, value: Any, low: float, high: float) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise UsageError(f"{name} is {value!r}", "give a whole number") from None
    if not low <= number <= high:
        raise UsageError(f"{name} is {number}", f"give a number from {low} to {high}")
    return number


def _number(name: str, value: Any, low: float, high: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{name} is {value!r}", "give a number") from None
    if not (math.isfinite(number) and low <= number <= high):
        raise UsageError(f"{name} is {number}", f"give a number from {low:g} to {high:g}")
    return number


def _numbers(parameter: Parameter, value: Any) -> tuple[float, ...]:
    try:
        numbers = tuple(value)
    except TypeError:
        numbers = ()
    if not numbers:
        hint = f"give a list of one or more numbers from {parameter.low:g} to {parameter.high:g}, or leave it out"
        raise UsageError(f"{parameter.name} is {value!r}", hint)
    return tuple(_number(parameter.name, number, parameter.low, parameter.high) for number in numbers)
