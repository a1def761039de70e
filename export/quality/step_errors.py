"""What becomes of the velocity of each step where it is not computed in full, on the way of a run that is.

Where the run's denoiser is a head, a body and a tail, the tail runs again with the residuals of earlier steps, as it
would where the body is left out: that costs little beside the step itself, and says what a mask does before it is
tried. What is taken over may be earlier velocities as well, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.base import Engine, Feeds, Handle, open_engine
from zimgkit.engines.bundle import Bundle, Component, TensorSpec
from zimgkit.export.quality.runs import FIRST_SEED, Trial
from zimgkit.export.quality.step_masks import LONGEST, Pair, pairs
from zimgkit.runtime.caching import pieces
from zimgkit.runtime.diffusion.caching import RESIDUAL, VELOCITY, Caching, change, weights
from zimgkit.runtime.diffusion.schedule import NUM_TRAIN_TIMESTEPS
from zimgkit.runtime.pipeline import Pipeline
from zimgkit.runtime.progress import Report, silent

Array = NDArray[np.float32]


@dataclass(frozen=True)
class StepErrors:
    """What was found of each step."""

    errors: dict[str, dict[tuple[Pair, int], float]]
    """What is taken over, of :data:`.caching.REUSED` -> errors as :mod:`.step_masks` takes them: the root mean square
    of how far off the latents are moved, over that of the last latents; the mean over prompts."""
    change: tuple[float, ...]
    """By step: how much the first block's residual differs from that of the step before, relative; 0 of the first.
    None where the denoiser is not cut."""


def step_errors(
    bundle: Bundle, trial: Trial, order: int, *, backend: str, device: str | None = None, report: Report = silent
) -> StepErrors:
    """Draw the pictures of a trial in full, and see in each step what leaving it out would do.

    Args:
        bundle: an open bundle; residuals are looked at where its denoiser is cut.
        trial: the pictures, all its fields filled in.
        order: of the extrapolation.
        backend: what runs the bundle.
        device: as the backend names devices.
        report: called with (stage, done, total).

    Raises:
        UsageError: the bundle does not take the trial.
        BackendError: the backend cannot run the bundle.
    """
    record = _Record(order)
    found = []
    with Pipeline(
        bundle, backend=backend, device=device, warn=lambda _: None, opener=partial(_open_recorded, record)
    ) as pipeline:
        for index in range(len(trial.prompts)):
            report("what each step changes", index, len(trial.prompts))
            found.append(_of_picture(pipeline, record, picture(trial, index)))
    report("what each step changes", len(found), len(found))
    return StepErrors(
        {
            reused: {key: float(np.mean([one.errors[reused][key] for one in found])) for key in errors}
            for reused, errors in found[0].errors.items()
        },
        tuple(map(float, np.mean([one.change for one in found], axis=0))),
    )


def _of_picture(pipeline: Pipeline, record: _Record, call: dict[str, Any]) -> StepErrors:
    """The same of one picture, drawn by a pipeline whose denoiser is recorded."""
    family, scale = pipeline.session.family, call["guidance_scale"]
    off: dict[str, dict[tuple[Pair, int], float]] = {}
    times: list[float] = []
    changes: list[float] = []

    def velocity(outputs: Iterable[Array], latents: Array) -> Array:
        positive, *negative = (family.velocity(output, latents) for output in outputs)
        return family.guide(positive, negative[0], scale) if negative else positive

    def after_step(_: Pipeline, step: int, time: float, tensors: dict[str, Array]) -> None:
        latents, given = tensors["latents"], record.given
        right = velocity((branch.velocity for branch in given), latents)
        for reused, pair in given[0].left_out:
            wrong = velocity((branch.left_out[reused, pair] for branch in given), latents)
            off.setdefault(reused, {})[pair, step] = _root_mean_square(wrong - right)
        times.append(time / NUM_TRAIN_TIMESTEPS)
        changes.extend(given[0].change)
        record.next_step()

    record.begin()
    latents = pipeline(**call, output_type="latent", callback_on_step_end=after_step).images
    lengths = -np.diff([*times, 0.0]) / _root_mean_square(latents)
    return StepErrors(
        {reused: {key: value * float(lengths[key[1]]) for key, value in own.items()} for reused, own in off.items()},
        (*changes,),
    )


def picture(trial: Trial, index: int) -> dict[str, Any]:
    """What the pipeline is called with for one of a trial's pictures."""
    call: dict[str, Any] = {
        "prompt": trial.prompts[index],
        "negative_prompt": trial.negative_prompt,
        "guidance_scale": trial.guidance_scale,
        "width": trial.width,
        "height": trial.height,
        "num_inference_steps": trial.steps,
        "seed": FIRST_SEED + index,
    }
    return call | ({"image": trial.pictures[index % len(trial.pictures)]} if trial.pictures else {})


def _root_mean_square(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


@dataclass(frozen=True)
class _Given:
    """What one branch of guidance gave in a step."""

    velocity: Array
    left_out: Mapping[tuple[str, Pair], Array]
    """What it would have given with what earlier steps left: which of :data:`.caching.REUSED`, and which steps."""
    change: tuple[float, ...]
    """One number, or none."""


@dataclass
class _Branch:
    """What of a branch's earlier steps is needed yet."""

    residuals: dict[int, Handle] = field(default_factory=dict)
    """Step -> what the body added."""
    velocities: dict[int, Array] = field(default_factory=dict)
    first: Array | None = None
    """What the first block added in the step before."""


@dataclass
class _Record:
    """A picture under way."""

    order: int
    step: int = 0
    given: list[_Given] = field(default_factory=list)
    """By branch, in this step."""
    branches: list[_Branch] = field(default_factory=list)

    def begin(self) -> None:
        """Forget the picture before."""
        self.step, self.given, self.branches = 0, [], []

    def next_step(self) -> None:
        """Forget what no later step takes over."""
        self.step, self.given = self.step + 1, []
        for branch in self.branches:
            for kept in (branch.residuals, branch.velocities):
                kept.pop(self.step - 2 * LONGEST - 2, None)


def _open_recorded(record: _Record, bundle: Bundle, component: str, backend: str, device: str | None) -> Engine:
    if component.partition(".")[0] != "denoiser":
        return open_engine(bundle, component, backend, device)
    names = pieces(bundle, component, backend, Caching((True, False), ())) or (component,)
    opened = [open_engine(bundle, name, backend, device) for name in names]
    return _Recorded(record, bundle.component(component), opened)


class _Recorded:
    """A denoiser's engine that runs its pieces, and the tail again with residuals of earlier steps; or one alone."""

    def __init__(self, record: _Record, whole: Component, opened: list[Engine]) -> None:
        self.inputs: Mapping[str, TensorSpec] = whole.inputs
        self.outputs: Mapping[str, TensorSpec] = whole.outputs
        self.device = opened[0].device
        self._record, self._opened = record, opened

    def upload(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, Handle]:
        """Each piece knows the element types of its own inputs."""
        takers = {name: next(piece for piece in self._opened if name in piece.inputs) for name in feeds}
        return {name: handle for name, to in takers.items() for handle in to.upload({name: feeds[name]}).values()}

    def run(self, feeds: Feeds, keep: Collection[str] = ()) -> dict[str, Any]:
        record = self._record
        step, before = record.step, [*pairs(record.step, record.order)]
        index = len(record.given)
        if index == len(record.branches):
            record.branches.append(_Branch())
        branch = record.branches[index]
        shares = {pair: weights(step, *pair, record.order) for pair in before}
        if len(self._opened) > 1:
            velocity, left_out, changed = self._run_pieces(feeds, branch, shares)
        else:
            velocity, left_out, changed = self._opened[0].run(feeds)["velocity"], {}, ()
        kept = branch.velocities
        for (last, older), (share, rest) in shares.items():
            found = np.float32(share) * kept[last] + np.float32(rest) * kept[last if older is None else older]
            left_out[VELOCITY, (last, older)] = found
        kept[step] = velocity
        record.given.append(_Given(velocity, left_out, changed))
        return {"velocity": velocity}

    def run_together(self, sets: Sequence[Feeds]) -> list[dict[str, Any]]:
        return [self.run(feeds) for feeds in sets]

    def _run_pieces(
        self, feeds: Feeds, branch: _Branch, shares: Mapping[Pair, tuple[float, float]]
    ) -> tuple[Array, dict[tuple[str, Pair], Array], tuple[float, ...]]:
        known, (head, body, tail), kept = dict(feeds), self._opened, branch.residuals
        for piece in (head, body):
            crossing = [name for name in piece.outputs if name != "change"]
            known |= piece.run({name: known[name] for name in piece.inputs}, crossing)
        first, residual = known["change"], known["residual"]

        def velocity(last: Handle, older: Handle, pair: tuple[float, float]) -> Array:
            given = known | {"residual": last, "older_residual": older, "weights": np.array(pair, np.float32)}
            found: Array = tail.run({name: given[name] for name in tail.inputs})["velocity"]
            return found

        left_out = {
            (RESIDUAL, (last, older)): velocity(kept[last], kept[last if older is None else older], pair)
            for (last, older), pair in shares.items()
        }
        changed = 0.0 if branch.first is None else change(first, branch.first)
        kept[self._record.step], branch.first = residual, first
        return velocity(residual, residual, (1.0, 0.0)), left_out, (changed,)

    def download(self, handle: Handle) -> NDArray[Any]:
        return self._opened[0].download(handle)

    def close(self) -> None:
        for engine in self._opened:
            engine.close()
