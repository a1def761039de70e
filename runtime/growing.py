"""Pictures whose first steps are taken at half the size, and that grow then; :mod:`.progressive` has the formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from zimgkit.runtime.diffusion.progressive import half_size, levels_at, low_frequencies, with_low_frequencies
from zimgkit.runtime.families import Family
from zimgkit.runtime.job import Array, Growth, Job
from zimgkit.runtime.request import Request

LATENT = 8
"""Pixels of a latent's sides."""


def small_levels(request: Request, sigmas: Array) -> Array | None:
    """The noise levels of the steps at half the size, and the one they reach; None where there are none.

    Args:
        request: the call.
        sigmas: float32 (steps + 1,), its schedule.

    Returns:
        float32 (small steps + 1,). The last step is never among them.
    """
    steps = min(round(request.progressive * (len(sigmas) - 1)), len(sigmas) - 2)
    if not steps:
        return None
    ratio = math.sqrt(math.prod(request.size) / math.prod(half_size(*request.size)))
    return levels_at(sigmas[: steps + 1], ratio)


def begin_small(jobs: Sequence[Job], levels: Array, family: Family) -> None:
    """Let jobs of one request, whose latents are noise, take their first steps at half the size."""
    request, step = jobs[0].request, len(levels) - 1
    small = half_size(*request.size)
    every = {conditions for job in jobs for conditions in (job.positive, job.negative) if conditions}
    at_half = {conditions: conditions.at(*small) for conditions in every}
    sigma = np.float32(jobs[0].schedule.sigmas[step])
    for job in jobs:
        if job.positive is None:
            continue
        noise = family.to_noise(job.latents, *request.size)
        enlarge = partial(enlarged, family, noise, small, sigma, levels[-1])
        job.growth = Growth(step, small, levels, job.positive, job.negative, enlarge)
        job.latents = family.from_noise(low_frequencies(noise, *(side // LATENT for side in small)))
        job.positive = at_half[job.positive]
        job.negative = at_half[job.negative] if job.negative else None


def enlarged(
    family: Family, noise: Array, size: tuple[int, int], sigma: np.float32, level: np.float32, latents: Array
) -> Array:
    """Latents of the small size at a noise level as those of the whole, at its own level.

    Args:
        family: what knows their form.
        noise: what the whole would have begun with, in the shape that noise is drawn in.
        size: the small one, in pixels.
        sigma: the level of the whole.
        level: that of the small one.
        latents: (1, ...).
    """
    return family.from_noise(with_low_frequencies(sigma * noise, sigma / level * family.to_noise(latents, *size)))
