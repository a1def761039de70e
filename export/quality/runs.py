"""Draw the pictures of a trial with a bundle, and record the velocities and latents of every step.

All runs of a trial start from the same noise. A forced run is given the latents of an earlier one at each step, so that
one step's error is not the next one's input. The prompt's embeddings and the modulation are the bundle's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.base import Engine, Feeds, Handle
from zimgkit.engines.bundle import Bundle, Manifest
from zimgkit.engines.errors import UsageError
from zimgkit.engines.torch.engine import TorchEngine
from zimgkit.engines.torch.engine import open_engine as open_torch
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
    pictures: tuple[str, ...] = ()
    """Files of pictures for a bundle that edits; each prompt takes the next one."""

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

    def check(self, manifest: Manifest) -> None:
        """Check that it has what a bundle draws from.

        Raises:
            UsageError: it has not.
        """
        takes = manifest.references
        if takes is not None and takes.least and not self.pictures:
            raise UsageError("a checkpoint that edits is measured on pictures", "name some with --calibration-image")


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
    if bundle.manifest.layers is not None:
        raise UsageError("what a precision costs where pictures are taken apart is not measured", "leave --measure out")
    with Pipeline(bundle, backend=backend, device=device, warn=lambda _: None, opener=opened) as pipeline:

        def draw(
            trial: Trial, earlier: Sequence[Run] = (), *, forced: bool = False, report: Report = silent
        ) -> list[Run]:
            found = []
            trial.check(bundle.manifest)
            for index, prompt in enumerate(trial.prompts):
                report("measure", index, len(trial.prompts))
                other = earlier[index] if earlier else None
                found.append(_draw(pipeline, given, prompt, index, trial, other, forced=forced))
            report("measure", len(trial.prompts), len(trial.prompts))
            return found

        yield draw


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
        image=trial.pictures[index % len(trial.pictures)] if trial.pictures else None,
        output_type="latent" if forced else "np",
        callback_on_step_end=after_step,
    )
    run.picture = None if forced else output.images[0]
    return run


def open_torch_in(compute: str, bundle: Bundle, component: str, _: str, device: str | None) -> TorchEngine:
    """Open a component in PyTorch, which computes in this element type."""
    return open_torch(bundle, component, device, compute)


def _open_recorded(
    opener: Opener, given: list[Array], bundle: Bundle, component: str, backend: str, device: str | None
) -> Engine:
    engine = opener(bundle, component, backend, device)
    return _Recorded(engine, given) if component.partition(".")[0] == "denoiser" else engine


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

    def run_together(self, sets: Sequence[Feeds]) -> list[dict[str, Any]]:
        return [self.run(feeds) for feeds in sets]

    def download(self, handle: Handle) -> NDArray[Any]:
        return self._engine.download(handle)

    def close(self) -> None:
        self._engine.close()
