"""What was asked for: a call's arguments, checked, with the bundle's defaults filled in and nothing left open."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import Manifest
from zimgkit.engines.errors import UsageError
from zimgkit.runtime.controls import ControlInput, check_sizes, read_controls
from zimgkit.runtime.diffusion.caching import OFF, Caching, caching
from zimgkit.runtime.diffusion.guidance import acts
from zimgkit.runtime.families import Family
from zimgkit.runtime.inputs import NONE, Inputs, first_step, read_inputs, size_in_area, size_like, size_of_edit
from zimgkit.runtime.parameters import BY_NAME, TENSORS, checked, refuse_unknown, texts

Array = NDArray[np.float32]
KNOWN = (*BY_NAME, *TENSORS)


@dataclass(frozen=True)
class Request:
    """A checked call."""

    prompts: tuple[str, ...]
    """Empty texts where ``prompt_embeds`` stand for them."""
    negative_prompts: tuple[str, ...] | None
    """One per prompt, or None where guidance is off."""
    num_images_per_prompt: int
    height: int
    width: int
    num_inference_steps: int
    sigmas: tuple[float, ...] | None
    guidance_scale: float
    cfg_normalization: float
    cfg_truncation: float
    seed: int | tuple[int, ...]
    """One seed for the whole batch, or one per picture."""
    max_sequence_length: int
    output_type: str
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    inputs: Inputs = NONE
    """The pictures it starts from."""
    controls: tuple[ControlInput, ...] = ()
    """The ControlNets that act."""
    layers: int | None = None
    """Into how many layers its picture is taken apart; None where it is not."""
    cache: str | None = None
    """Which steps are computed in full, as it was asked for; None where all are."""
    cache_negative: str | None = None
    """Likewise of the branch of the negative prompt, where something else was asked for."""
    cache_order: int | None = None
    """Of the extrapolation, where it was asked for."""
    cache_reuse: str | None = None
    """What is taken over, where it was asked for."""
    caching: Caching | None = None
    """What follows from these."""
    unused_negative_prompt: bool = field(default=False, compare=False)
    """Whether a negative prompt was given, and guidance is off."""
    latents: Array | None = field(default=None, compare=False, repr=False)
    """Float32 (batch, ...), where noise was given."""
    prompt_embeds: tuple[Array, ...] | None = field(default=None, compare=False, repr=False)
    """Float32 (tokens, hidden) for each prompt, where these were given."""
    negative_prompt_embeds: tuple[Array, ...] | None = field(default=None, compare=False, repr=False)

    @property
    def batch(self) -> int:
        """How many pictures."""
        return len(self.prompts) * self.num_images_per_prompt

    @property
    def frames(self) -> int:
        """How many pictures are drawn together as one: layers, and before them the whole that they make."""
        return 1 + (self.layers or 0)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def is_guided(self) -> bool:
        """Whether there is something to guide away from."""
        return self.negative_prompts is not None

    def guides_at(self, sigma: float) -> bool:
        """Whether that is done at a noise level."""
        return self.is_guided and acts(sigma, self.cfg_truncation, self.guidance_low, self.guidance_high)


def check(manifest: Manifest, family: Family, **call: Any) -> Request:
    """Check a call's arguments and fill in the bundle's defaults.

    Args:
        manifest: of the bundle.
        family: of the bundle.
        call: by the names of :data:`zimgkit.runtime.parameters.PARAMETERS` and
            :data:`~zimgkit.runtime.parameters.TENSORS`; None counts as not given.

    Raises:
        UsageError: naming the first argument that is not known or out of its range, and what it may be.
    """
    given = {name: value for name, value in call.items() if value is not None}
    # Empty containers ask for nothing, which ported code does.
    asked = [name for name, value in given.items() if name in KNOWN or not _is_empty(value)]
    refuse_unknown(asked, KNOWN)
    defaults, text = manifest.defaults, manifest.text

    def value(name: str, default: Any, *, high: float | None = None) -> Any:
        return checked(BY_NAME[name], given.get(name, default), high=high)

    embeds = _embeds("prompt_embeds", given)
    if embeds is None:
        prompts = texts("prompt", given.get("prompt", "" if manifest.layers else None))
        if manifest.layers and not all(text.strip() for text in prompts):
            raise UsageError("the prompt is empty", "say what the picture shows: no caption is written for it here")
    elif "prompt" in given:
        raise UsageError("prompt and prompt_embeds are both given", "give only one of them")
    else:
        prompts = ("",) * len(embeds)
    levels = checked(BY_NAME["sigmas"], given["sigmas"]) if "sigmas" in given else None
    scale = _guidance_scale(family, defaults.guidance_scale, given)
    steps = value("num_inference_steps", defaults.num_inference_steps)
    images = value("num_images_per_prompt", 1)
    batch = len(prompts) * images
    inputs = read_inputs(manifest, family, given)
    size: dict[str, Any] = {"height": defaults.height, "width": defaults.width}
    if manifest.references is not None and (inputs.references or inputs.image):
        size = dict(zip(size, size_of_edit(inputs, manifest.references), strict=True))
    elif inputs.image is not None:
        tall, wide = (value(side, 0, high=family.MAX_SIDE) if side in given else None for side in size)
        size = dict(zip(size, size_like(inputs.image, tall, wide, defaults.height * defaults.width), strict=True))
    elif inputs.layered is not None and manifest.layers is not None:
        area = value("resolution", manifest.layers.resolution) ** 2
        size = dict(zip(size, size_in_area(inputs.layered, area), strict=True))
    height = value("height", size["height"], high=family.MAX_SIDE)
    width = value("width", size["width"], high=family.MAX_SIDE)
    steps = len(levels) if levels else steps
    left_out = 0 if inputs.strength is None else first_step(steps, inputs.strength)
    cache = _cache(manifest, given, steps - left_out)
    layers = value("layers", given.get("layer_num", manifest.layers.layers)) if manifest.layers else None
    controls = read_controls(manifest, inputs, given)
    check_sizes(controls, height, width)
    low, high = value("guidance_low", 0.0), value("guidance_high", 1.0)
    if low > high:
        raise UsageError(f"guidance_low is {low:g}, above guidance_high, {high:g}", "no step would be guided")
    negative_embeds = _embeds("negative_prompt_embeds", given)
    negatives = _negatives(given, negative_embeds, len(prompts), family, scale)
    return Request(
        prompts=prompts,
        negative_prompts=negatives,
        num_images_per_prompt=images,
        height=height,
        width=width,
        num_inference_steps=steps,
        sigmas=levels,
        guidance_scale=scale,
        cfg_normalization=value("cfg_normalization", given.get("cfg_normalize", 0.0)),
        cfg_truncation=value("cfg_truncation", 1.0),
        guidance_low=low,
        guidance_high=high,
        seed=_seed(given, batch),
        max_sequence_length=value("max_sequence_length", text.max_sequence_length, high=text.max_tokens - text.drop),
        output_type=value("output_type", "pil"),
        inputs=inputs,
        controls=controls,
        layers=layers,
        **cache,
        unused_negative_prompt=negatives is None and _says_something(given.get("negative_prompt")),
        latents=check_latents(given["latents"], (batch, *family.latents_shape(height, width, 1 + (layers or 0))))
        if "latents" in given
        else None,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative_embeds * (len(prompts) // len(negative_embeds))
        if negatives and negative_embeds
        else None,
    )


def check_latents(value: Any, shape: tuple[int, ...], name: str = "latents") -> Array:
    """Latents that a caller gives, as float32.

    Raises:
        UsageError: they have another shape, or are no finite floating-point numbers.
    """
    given = as_array(value)
    if given.shape != shape:
        raise UsageError(f"{name} have the shape {given.shape}", f"this call takes {shape}")
    if not np.issubdtype(given.dtype, np.floating) or not np.isfinite(given).all():
        raise UsageError(f"{name} must be finite floating-point numbers")
    return given.astype(np.float32)


def as_array(value: Any) -> NDArray[Any]:
    """A numpy array of an array, or of a torch tensor on any device and of any element type."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def _says_something(value: Any) -> bool:
    return value is not None and any(text.strip() for text in texts("negative_prompt", value))


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict | list | tuple) and not value


def _cache(manifest: Manifest, given: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What is asked for of steps that are not computed in full, and what follows of it for so many steps."""
    names = ("cache", "cache_negative", "cache_order", "cache_reuse")
    asked = {name: checked(BY_NAME[name], given[name]) for name in names if name in given}
    for name in names[:2]:
        if not isinstance(asked.get(name, OFF), str):
            raise UsageError(f"{name} is {asked[name]!r}", "give a text, such as 'balanced'")
    cache, negative, order, reuse = (asked.get(name) for name in names)
    found = caching(OFF if cache is None else cache, steps, manifest.caches, negative, order, reuse)
    return asked | {"caching": found} if found else {}


def _embeds(name: str, given: Mapping[str, Any]) -> tuple[Array, ...] | None:
    """Rows of the text encoder: (batch, tokens, hidden), or a list of (tokens, hidden)."""
    if name not in given:
        return None
    value = given[name]
    entries = value if isinstance(value, list | tuple) else np.atleast_1d(as_array(value))
    rows = tuple(as_array(entry) for entry in entries)
    fits = rows and all(entry.ndim == 2 and len(entry) and np.issubdtype(entry.dtype, np.floating) for entry in rows)
    if not fits or not all(np.isfinite(entry).all() for entry in rows):
        hint = "give (batch, tokens, hidden), or a list of (tokens, hidden), of finite floating-point numbers"
        raise UsageError(f"{name} are no rows of the text encoder", hint)
    return tuple(entry.astype(np.float32) for entry in rows)


def _negatives(
    given: Mapping[str, Any], embeds: tuple[Array, ...] | None, prompts: int, family: Family, scale: float
) -> tuple[str, ...] | None:
    """One for each prompt: what was given, else what the family guides away from by itself, if anything."""
    if embeds is not None:
        if "negative_prompt" in given:
            raise UsageError("negative_prompt and negative_prompt_embeds are both given", "give only one of them")
        values: tuple[str, ...] = ("",) * len(embeds)
    else:
        value = given.get("negative_prompt", family.NEGATIVE_PROMPT)
        if value is None:
            return None
        values = texts("negative_prompt", value)
    if len(values) not in (1, prompts):
        raise UsageError(f"there are {len(values)} negative prompts for {prompts} prompts", "give one, or one for each")
    if not family.is_guided(scale):
        return None
    return values * prompts if len(values) == 1 else values


def _guidance_scale(family: Family, default: float, given: Mapping[str, Any]) -> float:
    names = [name for name in ("guidance_scale", "true_cfg_scale", "cfg_scale") if name in given]
    if len(names) > 1:
        message = "guidance_scale, true_cfg_scale and cfg_scale are names for one thing"
        raise UsageError(message, "give only one of them")
    if not names:
        return float(checked(BY_NAME["guidance_scale"], default))
    scale: float = checked(BY_NAME[names[0]], given[names[0]])
    return family.guidance_scale(scale) if names[0] == "cfg_scale" else scale


def _seed(given: Mapping[str, Any], pictures: int) -> int | tuple[int, ...]:
    seed = given.get("seed")
    if "generator" in given:
        if seed is not None:
            raise UsageError("seed and generator are both given", "give only one of them")
        seed = _seed_of(given["generator"])
    if seed is None:
        return secrets.randbelow(2**32)
    if isinstance(seed, list | tuple):
        if len(seed) != pictures:
            raise UsageError(f"there are {len(seed)} seeds for {pictures} pictures", "give one, or one for each")
        return tuple(checked(BY_NAME["seed"], entry) for entry in seed)
    number: int = checked(BY_NAME["seed"], seed)
    return number


def _seed_of(generator: Any) -> Any:
    """The seed a torch generator was made with; a number stands for itself, a list for one each."""
    if isinstance(generator, Sequence):
        return [_seed_of(one) for one in generator]
    initial_seed = getattr(generator, "initial_seed", None)
    return initial_seed() if callable(initial_seed) else generator
