"""Measure what a bundle's precision costs: the errors of its velocities, latents and pictures against float32.

All runs start from the same noise. Velocities are compared at the latents of the float32 run (forced runs): each step
is given those, so that one step's error is not the next one's input. The prompt's embeddings and the modulation are the
bundle's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.base import Engine, Feeds, Handle, open_engine
from zimgkit.engines.bundle import Bundle, Cost, Difference, Manifest
from zimgkit.engines.errors import ZimgError
from zimgkit.engines.torch.engine import TorchEngine
from zimgkit.engines.torch.engine import open_engine as open_torch
from zimgkit.export.quality.perceptual import lpips
from zimgkit.export.quality.similarity import cosine, psnr, relative_l2_error, ssim
from zimgkit.export.quantization.prompts import cost_prompts
from zimgkit.runtime.pipeline import Pipeline
from zimgkit.runtime.progress import Report, silent

Array = NDArray[np.float32]
Opener = Callable[[Bundle, str, str, "str | None"], Engine]
"""(bundle, component, backend, device) -> engine, as :class:`Pipeline` takes it."""

FIRST_SEED = 1000
"""Of the first prompt; the next ones follow. Calibrations take the seeds from 0 on, so no noise is in both."""


@dataclass(frozen=True)
class Trial:
    """The pictures that are compared; the bundle's defaults replace None, and :func:`cost_prompts` no prompts."""

    prompts: tuple[str, ...] = ()
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None

    def filled(self, manifest: Manifest) -> Trial:
        """Fill in the defaults of a bundle."""
        defaults = manifest.defaults
        return replace(
            self,
            prompts=self.prompts or cost_prompts(manifest.name),
            width=self.width or defaults.width,
            height=self.height or defaults.height,
            steps=self.steps or defaults.num_inference_steps,
            guidance_scale=defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            negative_prompt=defaults.negative_prompt if self.negative_prompt is None else self.negative_prompt,
        )


@dataclass(frozen=True)
class References:
    """Unquantized bundles of one checkpoint, with the same LoRAs."""

    float32: Bundle
    bfloat16: Bundle


@dataclass
class Run:
    """What one call of the pipeline computed on the way to a picture."""

    start: Array
    """The noise that it starts from."""
    velocities: list[list[Array]] = field(default_factory=list)
    """By step: the velocities, one for each branch of guidance."""
    latents: list[Array] = field(default_factory=list)
    """The latents after each step."""
    picture: Array | None = None
    """(height, width, 3) float32 from 0 to 1; None of a forced run."""


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


Draw = Callable[..., list[Run]]


@contextmanager
def drawing(bundle: Bundle, opener: Opener, *, backend: str = "torch", device: str | None = None) -> Iterator[Draw]:
    """Open a bundle for several runs of trials.

    Args:
        bundle: the bundle that draws.
        opener: opens its engines.
        backend: passed to the opener.
        device: passed to the opener.

    Yields:
        ``draw(trial, earlier=(), forced=False, report=silent)``, which gives a run for each prompt. The trial has all
        its fields filled in. ``earlier`` are runs of the same trial, whose noise the new ones start from; if
        ``forced``, each step starts from their latents as well, and no picture is decoded.
    """
    given: list[Array] = []
    opened = partial(_open_recorded, opener, given)
    with Pipeline(bundle, backend=backend, device=device, warn=lambda _: None, opener=opened) as pipeline:

        def draw(
            trial: Trial, earlier: Sequence[Run] = (), *, forced: bool = False, report: Report = silent
        ) -> list[Run]:
            found = []
            for index, prompt in enumerate(trial.prompts):
                report("measure", index, len(trial.prompts))
                other = earlier[index] if earlier else None
                found.append(_draw(pipeline, given, prompt, index, trial, other, forced=forced))
            report("measure", len(trial.prompts), len(trial.prompts))
            return found

        yield draw


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


def _draw(
    pipeline: Pipeline, given: list[Array], prompt: str, index: int, trial: Trial, earlier: Run | None, *, forced: bool
) -> Run:
    """Draw one picture; the recorded denoiser appends its outputs to ``given``."""
    family, width, height = pipeline.session.family, trial.width or 0, trial.height or 0
    start = earlier.start if earlier else pipeline.draw_noise(1, FIRST_SEED + index, height, width)
    run = Run(start)

    def after_step(_: Pipeline, step: int, __: float, tensors: dict[str, Array]) -> dict[str, Array] | None:
        latents = tensors["latents"]
        run.velocities.append([family.velocity(output, latents) for output in given])
        given.clear()
        run.latents.append(latents)
        return {"latents": earlier.latents[step]} if earlier and forced else None

    output = pipeline(
        prompt,
        negative_prompt=trial.negative_prompt,
        guidance_scale=trial.guidance_scale,
        width=width,
        height=height,
        num_inference_steps=trial.steps,
        latents=start,
        output_type="latent" if forced else "np",
        callback_on_step_end=after_step,
    )
    run.picture = None if forced else output.images[0]
    return run


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


def open_torch_in(compute: str, bundle: Bundle, component: str, _: str, device: str | None) -> TorchEngine:
    """Open a component in PyTorch, which computes in this element type."""
    return open_torch(bundle, component, device, compute)


def _open_recorded(
    opener: Opener, given: list[Array], bundle: Bundle, component: str, backend: str, device: str | None
) -> Engine:
    engine = opener(bundle, component, backend, device)
    return _Recorded(engine, given) if component == "denoiser" else engine


class _Recorded:
    """A denoiser's engine that appends a copy of each velocity to a list."""

    def __init__(self, engine: Engine, given: list[Array]) -> None:
        self.inputs, self.outputs, self.device = engine.inputs, engine.outputs, engine.device
        self._engine, self._given = engine, given

    def upload(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, Handle]:
        return self._engine.upload(feeds)

    def run(self, feeds: Feeds, keep: Collection[str] = ()) -> dict[str, Any]:
        found = self._engine.run(feeds, keep)
        velocity = found["velocity"]
        self._given.append(self.download(velocity) if isinstance(velocity, Handle) else velocity.copy())
        return found

    def download(self, handle: Handle) -> NDArray[Any]:
        return self._engine.download(handle)

    def close(self) -> None:
        self._engine.close()
