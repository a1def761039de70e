"""What a caller asks for: names of diffusers and DiffSynth, checked, with the bundle's defaults filled in."""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zimgkit.engines.bundle import Manifest
from zimgkit.engines.errors import UsageError
from zimgkit.runtime.families import Family

OUTPUT_TYPES = ("pil", "np", "latent")
MULTIPLE = 16
"""A token is a patch of 16 x 16 pixels."""
MAX_CHARACTERS = 100_000
"""A longer prompt is a mistake: no tokenizer makes fewer than a thousand tokens of it."""


@dataclass(frozen=True)
class Request:
    """A checked call, nothing left open."""

    prompts: tuple[str, ...]
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

    @property
    def batch(self) -> int:
        """How many pictures."""
        return len(self.prompts) * self.num_images_per_prompt


def check(
    manifest: Manifest,
    family: Family,
    *,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None = None,
    num_images_per_prompt: int = 1,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float | None = None,
    cfg_scale: float | None = None,
    cfg_normalization: float = 0.0,
    cfg_truncation: float = 1.0,
    seed: int | Sequence[int] | None = None,
    max_sequence_length: int | None = None,
    output_type: str = "pil",
) -> Request:
    """Check a call's arguments and fill in the bundle's defaults. See :meth:`zimgkit.runtime.Pipeline.__call__`.

    Raises:
        UsageError: naming the first argument that is out of its range, and what it may be.
    """
    prompts = _prompts("prompt", prompt)
    levels = _sigmas(sigmas)
    defaults = manifest.defaults
    scale = _guidance_scale(family, defaults.guidance_scale, guidance_scale, true_cfg_scale, cfg_scale)
    steps = (
        defaults.num_inference_steps
        if num_inference_steps is None
        else _integer("num_inference_steps", num_inference_steps, 1, 10_000)
    )
    if output_type not in OUTPUT_TYPES:
        raise UsageError(f"output_type is {output_type!r}", f"choose one of {', '.join(OUTPUT_TYPES)}")
    images = _integer("num_images_per_prompt", num_images_per_prompt, 1, 10_000)
    longest = manifest.text.max_tokens - manifest.text.drop
    length = manifest.text.max_sequence_length if max_sequence_length is None else max_sequence_length
    return Request(
        prompts=prompts,
        negative_prompts=_negatives(negative_prompt, len(prompts), family, scale),
        num_images_per_prompt=images,
        height=_side("height", defaults.height if height is None else height, family.MAX_SIDE),
        width=_side("width", defaults.width if width is None else width, family.MAX_SIDE),
        num_inference_steps=len(levels) if levels else steps,
        sigmas=levels,
        guidance_scale=scale,
        cfg_normalization=_number("cfg_normalization", cfg_normalization, 0, 1e6),
        cfg_truncation=_number("cfg_truncation", cfg_truncation, 0, 1e6),
        seed=_seed(seed, len(prompts) * images),
        max_sequence_length=_integer("max_sequence_length", length, 1, longest),
        output_type=output_type,
    )


def _prompts(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not values or not all(isinstance(entry, str) for entry in values):
        raise UsageError(f"{name} must be a text, or a list of texts")
    longest = max(len(entry) for entry in values)
    if longest > MAX_CHARACTERS:
        raise UsageError(f"{name} has {longest:,} characters", f"give at most {MAX_CHARACTERS:,}")
    return values


def _negatives(value: str | Sequence[str] | None, prompts: int, family: Family, scale: float) -> tuple[str, ...] | None:
    """As in the reference pipelines: Z-Image guides against an empty prompt by default, Qwen-Image not at all."""
    if value is None:
        value = family.NEGATIVE_PROMPT
    if value is None:
        return None
    values = _prompts("negative_prompt", value)
    if len(values) not in (1, prompts):
        raise UsageError(f"there are {len(values)} negative prompts for {prompts} prompts", "give one, or one for each")
    if not family.is_guided(scale, 1.0, 1.0):
        return None
    return values * prompts if len(values) == 1 else values


def _sigmas(values: Sequence[float] | None) -> tuple[float, ...] | None:
    if values is None:
        return None
    try:
        levels = tuple(values)
    except TypeError:
        levels = ()
    if not levels:
        raise UsageError(f"sigmas is {values!r}", "give a list of one or more numbers from 0 to 1, or leave it out")
    return tuple(_number("sigmas", level, 0, 1) for level in levels)


def _guidance_scale(family: Family, default: float, *given: float | None) -> float:
    guidance_scale, true_cfg_scale, cfg_scale = given
    if sum(value is not None for value in given) > 1:
        raise UsageError(
            "guidance_scale, true_cfg_scale and cfg_scale are names for one thing", "give only one of them"
        )
    for name, value in (("guidance_scale", guidance_scale), ("true_cfg_scale", true_cfg_scale)):
        if value is not None:
            return _number(name, value, -1000, 1000)
    return default if cfg_scale is None else family.guidance_scale(_number("cfg_scale", cfg_scale, -1000, 1000))


def _side(name: str, value: Any, longest: int) -> int:
    side = _integer(name, value, MULTIPLE, longest)
    if side % MULTIPLE:
        near = max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE)
        raise UsageError(f"{name} is {side}, not a multiple of {MULTIPLE}", f"the nearest that is: {near}")
    return side


def _integer(name: str, value: Any, lowest: int, highest: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise UsageError(f"{name} is {value!r}", "give a whole number") from None
    if not lowest <= number <= highest:
        raise UsageError(f"{name} is {number}", f"give a number from {lowest} to {highest}")
    return number


def _number(name: str, value: Any, lowest: float, highest: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{name} is {value!r}", "give a number") from None
    if not (math.isfinite(number) and lowest <= number <= highest):
        raise UsageError(f"{name} is {number}", f"give a number from {lowest:g} to {highest:g}")
    return number


def _seed(seed: int | Sequence[int] | None, pictures: int) -> int | tuple[int, ...]:
    if seed is None:
        return secrets.randbelow(2**32)
    if isinstance(seed, list | tuple):
        if len(seed) != pictures:
            raise UsageError(f"there are {len(seed)} seeds for {pictures} pictures", "give one, or one for each")
        return tuple(_integer("seed", entry, -(2**63), 2**64 - 1) for entry in seed)
    return _integer("seed", seed, -(2**63), 2**64 - 1)
