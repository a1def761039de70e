"""What a cached run costs and saves: pictures with a mask beside the same ones without, and how long both take."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType

import numpy as np

from zimgkit.engines.bundle import Bundle, CacheCost, CacheMask
from zimgkit.export.quality.perceptual import lpips
from zimgkit.export.quality.runs import FIRST_SEED, Array, Trial
from zimgkit.export.quality.similarity import psnr, ssim
from zimgkit.export.quality.step_errors import picture
from zimgkit.runtime.pipeline import Pipeline
from zimgkit.runtime.progress import Report, silent

FIRST = {"num_inference_steps": 3, "cache": "101"}
"""What is drawn of a prompt before anything is timed: it reads the prompt, and opens all that any mask needs."""


class Pictures:
    """The pictures of a trial, with masks and without. Each is drawn and timed once. Use as a context.

    Args:
        bundle: an open bundle.
        trial: the pictures, all its fields filled in.
        backend: what runs the bundle.
        device: as the backend names devices.
        report: called with (stage, done, total).
    """

    def __init__(
        self, bundle: Bundle, trial: Trial, *, backend: str, device: str | None = None, report: Report = silent
    ) -> None:
        self._pipeline = Pipeline(bundle, backend=backend, device=device, warn=lambda _: None)
        self._trial, self._backend, self._report = trial, backend, report
        self._drawn: dict[tuple[CacheMask | None, int], tuple[Array, float]] = {}

    def __enter__(self) -> Pictures:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pipeline.close()

    def psnr(self, mask: CacheMask) -> float:
        """Of the pictures with a mask beside those without, in dB, from their mean squared error.

        Raises:
            BackendError: the backend failed.
        """
        self._draw({"": None, "tried": mask})
        found = psnr(self._squared(mask))
        return math.inf if found is None else found

    def costs(self, masks: Mapping[str, CacheMask]) -> dict[str, CacheCost]:
        """What each mask costs and saves.

        Raises:
            BackendError: the backend failed.
        """
        self._draw({"": None, **masks})
        trial, distance = self._trial, lpips()
        size = trial.width or 0, trial.height or 0
        found = {}
        for name, mask in masks.items():
            pairs = [(self._of(mask, index)[0], self._of(None, index)[0]) for index, _ in enumerate(trial.prompts)]
            seconds = [sum(self._of(one, index)[1] for index, _ in enumerate(trial.prompts)) for one in (None, mask)]
            found[name] = CacheCost(
                trial.prompts,
                FIRST_SEED,
                *size,
                self._backend,
                speed=seconds[0] / seconds[1],
                psnr=psnr(self._squared(mask)),
                ssim=float(np.mean([ssim(*pair) for pair in pairs])),
                lpips=float(np.mean([distance(*pair) for pair in pairs])) if distance else None,
            )
        return found

    def _squared(self, mask: CacheMask) -> float:
        pairs = [(self._of(mask, index)[0], self._of(None, index)[0]) for index, _ in enumerate(self._trial.prompts)]
        return float(np.mean([np.mean((own.astype(np.float64) - other) ** 2) for own, other in pairs]))

    def _of(self, mask: CacheMask | None, index: int) -> tuple[Array, float]:
        return self._drawn[_bare(mask), index]

    def _draw(self, masks: Mapping[str, CacheMask | None]) -> None:
        """Draw what is missing: of each prompt with all of them in turn, so that they find the machine alike."""
        wanted = dict.fromkeys(map(_bare, masks.values()))
        missing = [(mask, index) for index, _ in enumerate(self._trial.prompts) for mask in wanted]
        missing = [key for key in missing if key not in self._drawn]
        last = -1
        for done, (mask, index) in enumerate(missing):
            self._report("draw with masks and without", done, len(missing))
            call = picture(self._trial, index) | {"output_type": "np"}
            for reuse in {one.reuse for one in wanted if one} if index != last else ():
                self._pipeline(**call | FIRST, cache_reuse=reuse)
            last = index
            cached = {"cache": mask.steps, "cache_order": mask.order, "cache_reuse": mask.reuse} if mask else {}
            start = time.perf_counter()
            image: Array = self._pipeline(**call | cached).images[0]
            self._drawn[mask, index] = image, time.perf_counter() - start
        self._report("draw with masks and without", len(missing), len(missing))


def _bare(mask: CacheMask | None) -> CacheMask | None:
    """A mask without what is known of it."""
    return CacheMask(mask.steps, order=mask.order, reuse=mask.reuse) if mask else None
