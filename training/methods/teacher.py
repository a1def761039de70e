"""A bundle as the teacher: the latents that it goes through, drawn by its engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import UsageError
from zimgkit.runtime import Pipeline
from zimgkit.runtime.diffusion.latents import normalize
from zimgkit.runtime.diffusion.schedule import Scheduler, calculate_mu, flow_match_sigmas, read_scheduler
from zimgkit.runtime.families import Family
from zimgkit.runtime.job import Schedule
from zimgkit.runtime.request import check
from zimgkit.training.dataset import Size

Array = NDArray[np.float32]


def sigmas_of(family: Family, scheduler: Scheduler, steps: int, size: Size) -> Array:
    """The noise levels that a pipeline has for a size, float32 (steps + 1,), down to 0."""
    height, width = size
    mu = calculate_mu((height // 16) * (width // 16), scheduler)
    return flow_match_sigmas(steps, scheduler, mu=mu, sigmas=family.base_sigmas(steps))


def student_scheduler(config: Mapping[str, Any], shift: float | None) -> dict[str, Any]:
    """What a student changes in a scheduler's config: nothing, or one shift for all sizes and no terminal sigma.

    The latter is what published few-step LoRAs are distilled at.

    Raises:
        UsageError: the shift is not above 0.
    """
    if shift is None:
        return {}
    if not shift > 0:
        raise UsageError(f"--shift is {shift}", "it must be more than 0")
    if not config.get("use_dynamic_shifting"):
        return {"shift": shift}
    mu = float(np.log(shift))
    return {"base_shift": mu, "max_shift": mu, "shift": 1.0, "shift_terminal": None, "time_shift_type": "exponential"}


def passing_through(sigmas: Array, wanted: Array) -> tuple[Array, list[int]]:
    """A schedule with those of its levels that lie nearest to the wanted ones moved there, and their places.

    As schedules of DiffSynth-Studio do with ``target_timesteps``.

    Args:
        sigmas: float32 (steps + 1,), falling, down to 0.
        wanted: the same, with fewer steps.

    Raises:
        UsageError: two of the wanted ones lie nearest to the same.
    """
    moved = sigmas.copy()
    places = [int(np.abs(sigmas - level).argmin()) for level in wanted]
    moved[places] = wanted
    if len(set(places)) < len(places) or (np.diff(moved) >= 0).any():
        raise UsageError(
            f"a teacher of {len(sigmas) - 1} steps has too few for a student of {len(wanted) - 1}",
            "give more --teacher_num_inference_steps",
        )
    return moved, places


def draw_trajectory(
    pipeline: Pipeline, prompt: str, size: Size, seed: int, through: Array | None, call: Mapping[str, Any]
) -> Array:
    """The latents that a picture goes through.

    Args:
        pipeline: of the bundle.
        prompt: what is drawn.
        size: height and width in pixels.
        seed: of the noise.
        through: float32 (n,), noise levels, down to 0; None for the first and the last alone.
        call: more arguments of the pipeline, its steps and guidance among them.

    Returns:
        float32 (n or 2, channels, height / 8, width / 8): at each of these, as the network knows them.
    """
    session, (height, width) = pipeline.session, size
    defaults = {"negative_prompt": pipeline.bundle.manifest.defaults.negative_prompt}
    arguments = {**defaults, "prompt": prompt, "height": height, "width": width, "seed": seed, **call}
    (job,) = session.begin(check(pipeline.bundle.manifest, session.family, **arguments))
    try:
        sigmas, places = job.schedule.sigmas, [0, len(job.schedule)]
        if through is not None:
            sigmas, places = passing_through(sigmas, through)
            job.schedule = Schedule(sigmas, session.family.schedule_inputs(pipeline.bundle, sigmas[:-1]))
        passed = [job.latents]
        while not job.is_denoised:
            session.step([job])
            passed.append(job.latents)
    finally:
        job.release()
    return as_the_network_knows_them(session.family, [passed[place] for place in places], size)


def as_the_network_knows_them(family: Family, latents: Sequence[Array], size: Size) -> Array:
    """Latents (1, ...) in the form that the family keeps them, as (n, channels, height / 8, width / 8)."""
    raw = np.concatenate([family.to_vae(one, *size) for one in latents])
    return normalize(raw, family.normalization)


def scheduler_with(config: Mapping[str, Any], changes: Mapping[str, Any]) -> Scheduler:
    """A scheduler's config with changes, checked."""
    return read_scheduler({**config, **changes})
