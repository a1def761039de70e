"""LoRAs that need other settings than their checkpoint: how many steps, which guidance, which schedule.

Guidance scales are diffusers': 1 is none for Qwen-Image, 0 for Z-Image.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from zimgkit.engines.bundle import Defaults, MergedLora
from zimgkit.engines.errors import UsageError


@dataclass(frozen=True)
class Known:
    """A LoRA, or a series of them, known by its file's or its repository's name."""

    pattern: str
    """Anywhere in the path, in any case of letters. A group ``steps`` says how many steps."""
    family: str
    guidance_scale: float
    steps: int = 0
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """What it changes in the scheduler's config."""


def _shifted(factor: float) -> dict[str, Any]:
    """The same shift for every size."""
    return {"use_dynamic_shifting": True, "base_shift": math.log(factor), "max_shift": math.log(factor)}


KNOWN = (
    # https://github.com/ModelTC/Qwen-Image-Lightning, generate_with_diffusers.py: distilled at a shift of 3.
    Known(
        r"Qwen-Image(-2512)?-Lightning-(?P<steps>\d+)steps",
        "qwen-image",
        1.0,
        scheduler=_shifted(3) | {"shift": 1.0, "shift_terminal": None, "time_shift_type": "exponential"},
    ),
    # https://github.com/modelscope/DiffSynth-Studio, examples/qwen_image/model_inference: the ordinary schedule.
    Known(r"Qwen-Image-Distill-LoRA", "qwen-image", 1.0, 15),
    # The same place, Qwen-Image-Distill-DMD2.py: exponential_shift_mu=math.log(2.5), the terminal sigma kept.
    Known(r"qwen_image_distill_3step", "qwen-image", 1.0, 3, _shifted(2.5)),
    # Its model card: gives a LoRA that was trained on Z-Image-Turbo the settings of Turbo back.
    Known(r"Z-Image-Turbo-DistillPatch", "z-image", 0.0, 8),
)


@dataclass(frozen=True)
class Settings:
    """What a bundle recommends."""

    defaults: Defaults
    scheduler: Mapping[str, Any]


def settings_for(
    loras: Sequence[MergedLora],
    family: str,
    base: Settings,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> Settings:
    """The settings with LoRAs: what known ones need, unless the user says otherwise.

    Args:
        loras: what is merged.
        family: of the checkpoint.
        base: the settings without LoRAs.
        num_inference_steps: the user's.
        guidance_scale: the user's, as diffusers counts it.

    Raises:
        UsageError: two of them need different settings, or a number is out of range.
    """
    if num_inference_steps is not None and num_inference_steps < 1:
        raise UsageError(f"num_inference_steps is {num_inference_steps}", "give 1 or more")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise UsageError(f"the guidance scale is {guidance_scale}", "give a finite number")
    needs = {}
    for lora in loras:
        if lora.scale > 0 and (found := _find(lora.source, family)):
            steps, known = found
            needs[steps, known.guidance_scale, tuple(known.scheduler.items())] = lora.file
    if len(needs) > 1:
        both = " and ".join(needs.values())
        raise UsageError(f"{both} need different numbers of steps or schedules", "merge one of them")
    scheduler, changes = dict(base.scheduler), {}
    for steps, guidance, shift in needs:
        changes = {"num_inference_steps": steps, "guidance_scale": guidance}
        scheduler |= dict(shift)
    chosen = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    changes |= {key: value for key, value in chosen.items() if value is not None}
    return Settings(msgspec.structs.replace(base.defaults, **changes), scheduler)


def _find(source: str, family: str) -> tuple[int, Known] | None:
    """The entry of a LoRA, and how many steps it wants."""
    # Of a path only its end: what lies above may be called anything.
    end = "/".join(source.split("/")[-4:])
    for known in KNOWN:
        if known.family == family and (match := re.search(known.pattern, end, re.IGNORECASE)):
            return known.steps or int(match["steps"]), known
    return None
