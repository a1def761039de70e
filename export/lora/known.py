"""LoRAs that need other settings than their checkpoint: how many steps, which guidance, which schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from zimgkit.engines.bundle import Defaults, MergedLora, ReferencePictures
from zimgkit.engines.errors import UsageError
from zimgkit.export.networks.registry import FewStepLora, TaskLora, row


@dataclass(frozen=True)
class Recommendation:
    """What a bundle recommends."""

    defaults: Defaults
    scheduler: Mapping[str, Any]


def recommendation_for(
    loras: Sequence[MergedLora],
    family: str,
    base: Recommendation,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> Recommendation:
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
    return Recommendation(msgspec.structs.replace(base.defaults, **changes), scheduler)


def tasks_for(loras: Sequence[MergedLora], family: str) -> list[str]:
    """What known LoRAs among these are for."""
    return [task for known in _task_loras(loras, family) for task in known.tasks]


def references_with(
    references: ReferencePictures | None, loras: Sequence[MergedLora], family: str
) -> ReferencePictures | None:
    """How a checkpoint takes pictures with these LoRAs, where it takes any."""
    changes = {key: value for known in _task_loras(loras, family) for key, value in known.references.items()}
    return msgspec.structs.replace(references, **changes) if references else None


def _task_loras(loras: Sequence[MergedLora], family: str) -> list[TaskLora]:
    found = []
    for lora in loras:
        end = "/".join(lora.source.split("/")[-4:])
        found += [known for known in row(family).task_loras if re.search(known.pattern, end, re.IGNORECASE)]
    return found


def _find(source: str, family: str) -> tuple[int, FewStepLora] | None:
    """The entry of a LoRA, and how many steps it wants."""
    # Of a path only its end: what lies above may be called anything.
    end = "/".join(source.split("/")[-4:])
    for known in row(family).few_step_loras:
        if match := re.search(known.pattern, end, re.IGNORECASE):
            return known.steps or int(match["steps"]), known
    return None
