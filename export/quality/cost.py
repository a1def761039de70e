"""Measure what a bundle's precision costs: the errors of its velocities, latents and pictures against float32.

Velocities are compared at the latents of the float32 run (forced runs); latents and pictures are those of further runs,
whose steps start from their own latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from zimgkit.engines.base import open_engine
from zimgkit.engines.bundle import Bundle, Cost, Difference
from zimgkit.engines.errors import ZimgError
from zimgkit.export.quality.perceptual import lpips
from zimgkit.export.quality.runs import FIRST_SEED, Array, Draw, Run, Trial, drawing, open_torch_in
from zimgkit.export.quality.similarity import cosine, psnr, relative_l2_error, ssim
from zimgkit.runtime.progress import Report, silent


@dataclass(frozen=True)
class References:
    """Unquantized bundles of one checkpoint, with the same LoRAs."""

    float32: Bundle
    bfloat16: Bundle


@dataclass(frozen=True)
class Baseline:
    """The float32 runs that bundles of a checkpoint are compared with."""

    trial: Trial
    expected: list[Run]
    """The runs of the float32 bundle."""
    floor: Difference
    """The errors of the bfloat16 bundle: those of an unquantized one."""


def baseline(references: References, trial: Trial, *, device: str | None = None, report: Report = silent) -> Baseline:
    """Draw the pictures of a trial in PyTorch, in float32 and in bfloat16 arithmetic.

    Args:
        references: the bundles that draw them.
        trial: the pictures, with the float32 bundle's defaults where it has none.
        device: as torch names devices.
        report: called with (stage, done, total).

    Raises:
        UsageError: the model does not take the prompts, the size or the steps.
        BackendError: PyTorch cannot run a graph.
    """
    trial = trial.filled(references.float32.manifest)
    with drawing(references.float32, partial(open_torch_in, "float32"), device=device) as draw:
        expected = draw(trial, report=report)
    with drawing(references.bfloat16, partial(open_torch_in, "bfloat16"), device=device) as draw:
        return Baseline(trial, expected, _compared(draw, trial, expected, report))


def measure(
    bundle: Bundle,
    against: Baseline,
    *,
    backend: str = "onnxruntime",
    device: str | None = None,
    report: Report = silent,
) -> Cost:
    """Draw the pictures of a baseline with a bundle, and compare them.

    Args:
        bundle: the bundle whose cost is measured.
        against: the runs that it is compared with.
        backend: what runs the bundle.
        device: as the backend names devices.
        report: called with (stage, done, total).

    Raises:
        BackendError: the backend cannot run the bundle.
        ZimgError: the bundle computes NaN or Inf.
    """
    trial = against.trial
    with drawing(bundle, open_engine, backend=backend, device=device) as draw:
        own = _compared(draw, trial, against.expected, report)
    return Cost(
        prompts=trial.prompts,
        first_seed=FIRST_SEED,
        width=trial.width or 0,
        height=trial.height or 0,
        num_inference_steps=trial.steps or 0,
        backend=backend,
        difference=own,
        floor=against.floor,
    )


def difference(expected: Sequence[Run], forced: Sequence[Run], unforced: Sequence[Run]) -> Difference:
    """Compare runs of the same pictures.

    Args:
        expected: the float32 runs.
        forced: runs at the latents of those; their velocities are compared.
        unforced: runs at latents of their own; those latents and their pictures are compared.

    Raises:
        ZimgError: a velocity, a latent or a picture is NaN or Inf.
    """
    velocities = velocity_errors(expected, forced)
    latents = _by_step(unforced, expected, lambda run, step: [run.latents[step]])
    pictures = [(own.picture, other.picture) for own, other in zip(unforced, expected, strict=True)]
    pairs = [(own, other) for own, other in pictures if own is not None and other is not None]
    squared = float(np.mean([np.mean((own.astype(np.float64) - other) ** 2) for own, other in pairs]))
    result = Difference(
        velocity_relative=tuple(float(np.mean(values)) for values, _ in velocities),
        velocity_cosine=tuple(min(values) for _, values in velocities),
        latents_relative=tuple(float(np.mean(values)) for values, _ in latents),
        latents_cosine=tuple(min(values) for _, values in latents),
        psnr=psnr(squared),
        ssim=float(np.mean([ssim(own, other) for own, other in pairs])),
        lpips=float(np.mean([distance(own, other) for own, other in pairs])) if (distance := lpips()) else None,
    )
    measured = (result.velocity_relative, result.latents_relative, (squared, result.ssim))
    if not all(np.isfinite(value) for values in measured for value in values):
        message = "the bundle computes NaN or Inf where its checkpoint does not"
        raise ZimgError(message, "leave more linears unquantized with --recipe")
    return result


def velocity_errors(expected: Sequence[Run], forced: Sequence[Run]) -> list[tuple[list[float], list[float]]]:
    """By step: the relative L2 errors and the cosines of the velocities of all runs and branches of guidance."""
    return _by_step(forced, expected, lambda run, step: run.velocities[step])


def past_bound(bundle: Bundle, cost: Cost) -> str | None:
    """Say why a cost is past the bound of the bundle's recipe; None where it is within, or there is no bound."""
    quantization = bundle.manifest.quantization
    bound = quantization.bound if quantization else None
    if bound is None or cost.cosine >= bound:
        return None
    return f"the cosine of a velocity and the float32 network's is {cost.cosine:.5f}, and the recipe asks for {bound}"


def _compared(draw: Draw, trial: Trial, expected: Sequence[Run], report: Report) -> Difference:
    forced = draw(trial, expected, forced=True, report=report)
    return difference(expected, forced, draw(trial, expected, report=report))


Pairs = Callable[[Run, int], Sequence[Array]]


def _by_step(found: Sequence[Run], expected: Sequence[Run], arrays: Pairs) -> list[tuple[list[float], list[float]]]:
    """By step: the relative L2 errors and the cosines of the arrays that ``arrays`` takes from a run, over all runs."""
    result = []
    for step in range(len(expected[0].latents)):
        pairs = [
            pair
            for own, other in zip(found, expected, strict=True)
            for pair in zip(arrays(own, step), arrays(other, step), strict=True)
        ]
        result.append(([relative_l2_error(*pair) for pair in pairs], [cosine(*pair) for pair in pairs]))
    return result
