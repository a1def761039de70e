"""What the loop needs to train on a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimgkit.training import prompts
from zimgkit.training.dataset import Size, draw_batch
from zimgkit.training.diffusion import LENGTHS, Denoiser, DenoiserTask
from zimgkit.training.families import TrainingFamily
from zimgkit.training.methods.cache import Cache, Texts
from zimgkit.training.methods.losses import DirectDistillation, TrajectoryImitation
from zimgkit.training.methods.process import DISTILL, SFT


class DistillationTask:
    """What the loop needs to train a student on a teacher's trajectories."""

    hidden: frozenset[str] = frozenset()

    def __init__(self, method: str, cache: Cache, family: TrainingFamily, transformer: Any) -> None:
        self.name = method
        self.draw: Callable[[Path], None] = lambda path: None
        self._picks_steps = self.name != DISTILL
        kind = TrajectoryImitation if self._picks_steps else DirectDistillation
        self.module = kind(family, transformer)
        self._cache = cache
        self._sigmas = {
            tuple(map(int, size.split("x"))): torch.tensor(levels) for size, levels in cache.index.sigmas.items()
        }
        self._groups: dict[tuple[Size, int], Tensor] = {}
        for size, rows in cache.buckets.items():
            lengths = torch.tensor([-(-cache.length(int(row)) // LENGTHS) for row in rows])
            for length in lengths.unique().tolist():
                self._groups[size, int(length)] = rows[lengths == length]

    def batch(self, generator: torch.Generator, batch_size: int) -> dict[str, Tensor]:
        """Trajectories of one size, the student's noise levels, and texts; no text is left out."""
        (size, _), rows = draw_batch(self._groups, batch_size, generator)
        sigmas = self._sigmas[size]
        text, mask = prompts.pad([self._cache.get("text", int(row)) for row in rows])
        steps = len(sigmas) - 1
        drawn = {"step": torch.randint(steps, (batch_size,), generator=generator)} if self._picks_steps else {}
        return drawn | {
            "trajectory": torch.stack([self._cache.get("trajectory", int(row)) for row in rows]),
            "sigmas": sigmas.expand(batch_size, -1),
            "text": text,
            "mask": mask,
        }

    def preview(self, path: Path) -> None:
        """A few of the captions, drawn."""
        self.draw(path)


Task = DenoiserTask | DistillationTask


def task_of(method: str, cache: Cache, family: TrainingFamily, transformer: Any, scheduler: Mapping[str, Any]) -> Task:
    """The task of training a transformer on a cache.

    Args:
        method: that is trained.
        cache: what the first stage made for it.
        family: of the transformer.
        transformer: of diffusers; what of it ``requires_grad`` is trained.
        scheduler: ``scheduler_config.json`` of the checkpoint.
    """
    if method != SFT:
        return DistillationTask(method, cache, family, transformer)
    texts, nothing = Texts(cache), Texts(cache, no_prompts=True)
    return DenoiserTask(SFT, Denoiser(family, transformer), cache, texts, nothing, scheduler)
