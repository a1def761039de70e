"""Block caching at work: a step of jobs that go together, in full or with what full steps before left.

A full step runs the denoiser's head, body and tail. A cached one leaves the body out, and the tail takes the residuals
of full steps, which never leave the device. Of a denoiser that is not cut the velocity itself is what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zimgkit.engines.base import Feeds, Handle
from zimgkit.engines.bundle import Bundle, Manifest
from zimgkit.engines.errors import UsageError
from zimgkit.runtime.control_conditions import component_of
from zimgkit.runtime.diffusion.caching import VELOCITY, Caching, change, weights
from zimgkit.runtime.engine_pool import Borrowed, EnginePool
from zimgkit.runtime.job import Array, Job
from zimgkit.runtime.request import Request

Key = tuple[str, bool]
"""A denoiser, and whether it is for the branch of the prompt."""
COMPILED = ("tensorrt",)
"""Backends that run nothing that was not compiled."""


@dataclass(frozen=True, eq=False)
class Full:
    """What a full step left of pictures that were computed together."""

    step: int
    residual: Any
    """Float32 (pictures, tokens, dim) on the device; of a denoiser that is not cut the velocity, on the host."""
    change: Array | None = None
    """What the first block added to its stream, where that decides which steps are full."""


@dataclass(frozen=True, eq=False)
class Row:
    """One picture of these."""

    full: Full
    index: int


def pieces(bundle: Bundle, component: str, backend: str, asked: Caching | None) -> tuple[str, ...]:
    """The head, body and tail that a denoiser is run in; none where it is run whole.

    That is so without a cache and where velocities are reused, and where it is not cut, or the pieces are not compiled
    and have to be.

    Args:
        bundle: an open bundle.
        component: the denoiser.
        backend: what runs it.
        asked: the cache, if any.
    """
    found = bundle.manifest.pieces(component) if asked and asked.saves and asked.reuse != VELOCITY else ()
    served = backend not in COMPILED or all(bundle.engines(name, backend) for name in found)
    return found if served else ()


def cached_share(manifest: Manifest, component: str = "denoiser") -> float:
    """What a cached step of a cut denoiser takes of a full one, from 0 to 1, by the weights that head and tail read.

    Args:
        manifest: of the bundle.
        component: a denoiser that is cut.
    """
    head, _, tail = (manifest.components[name].weight_bytes for name in manifest.pieces(component))
    return (head + tail) / manifest.components[component].weight_bytes


def most_residuals(request: Request) -> int:
    """How many residuals a request keeps at the most: one in each branch, or two to extrapolate, and a new one."""
    order = request.caching.order if request.caching else 0
    return (1 + request.is_guided) * (1 + order) + 1


def notes(bundle: Bundle, request: Request, backend: str) -> list[str]:
    """What the caller should know of the cache that was asked for.

    Raises:
        UsageError: the change shall decide, and nothing tells it.
    """
    asked = request.caching
    if asked is None or not asked.saves:
        return [*asked.notes] if asked else []
    component = component_of(bundle, request)
    if asked.reuse == VELOCITY or pieces(bundle, component, backend, asked):
        return [*asked.notes]
    if names := bundle.manifest.pieces(component):
        what = f"the pieces of the {component} are not compiled"
        hint = " ".join(f"--component {name}" for name in names)
        hint = f"compile them: zimg-export compile {bundle.root} {hint}"
    else:
        what, hint = f"the {component} of this bundle is not cut", "build it with --cut-denoiser"
    if asked.threshold is not None:
        raise UsageError(f"{what}, and only its head tells how much has changed", f"{hint}; or give another cache")
    return [*asked.notes, f"{what}, so that velocities are reused, and not residuals; {hint}"]


class CachedStep:
    """One step of a group of jobs, in as many branches as it has.

    Args:
        engines: of the bundle.
        device_of: component -> where it runs.
        group: jobs that share everything but their latents; just one where the change decides.
        caching: which steps are full.
    """

    def __init__(
        self,
        engines: EnginePool,
        device_of: Callable[[str], str | None],
        group: Sequence[Job],
        caching: Caching,
    ) -> None:
        self._engines, self._device_of = engines, device_of
        self._group, self._caching, self._step = group, caching, group[0].step
        self._decided: bool | None = None
        """Whether the step is full, once the first branch has found out."""

    def run(self, component: str, feeds: Callable[[Borrowed], Feeds], *, positive: bool) -> Array:
        """The velocity, as the denoiser gives it, in one branch of guidance.

        Args:
            component: the denoiser.
            feeds: makes its inputs, on the device of an engine.
            positive: whether it is the prompt's branch.
        """
        key, bundle = (component, positive), self._engines.bundle
        names = pieces(bundle, component, self._engines.backend, self._caching)
        wanted = (self._caching.positive if positive else self._caching.negative)[self._step]
        return self._of_pieces(key, names, feeds, wanted) if names else self._of_whole(key, feeds, wanted)

    def _of_whole(self, key: Key, feeds: Callable[[Borrowed], Feeds], wanted: bool) -> Array:
        """The velocity of a denoiser that is not cut."""
        with self._engines.engine(key[0], self._device_of(key[0])) as engine:
            known = self._known(key, engine)
            if not known or wanted or self._caching.threshold is not None:
                known = [Full(self._step, engine.run(feeds(engine))["velocity"])]
                self._keep(key, known[0])
        share, rest = self._weights(known)
        velocity: Array = np.float32(share) * known[0].residual + np.float32(rest) * known[-1].residual
        return velocity

    def _of_pieces(self, key: Key, names: Sequence[str], feeds: Callable[[Borrowed], Feeds], wanted: bool) -> Array:
        """The velocity of a head, a body and a tail."""
        head, body, tail = names
        with self._engines.engine(head, self._device_of(head)) as engine:
            known = self._known(key, engine)
            there = {**feeds(engine)}
            compares = self._caching.threshold is not None
            there |= self._run(head, engine, there, all_but="change" if compares else "")
        moved = there.pop("change")
        if not known or self._is_full(wanted, known[0], moved if compares else None):
            with self._engines.engine(body, self._device_of(body)) as engine:
                residual = self._run(body, engine, there)["residual"]
            full = Full(self._step, residual, moved if compares else None)
            known = [full, *(one for one in known if one.step < self._step)]
            self._keep(key, full)
        there |= {"residual": known[0].residual, "older_residual": known[-1].residual}
        there["weights"] = np.array(self._weights(known), np.float32)
        with self._engines.engine(tail, self._device_of(tail)) as engine:
            velocity: Array = self._run(tail, engine, there, all_but="velocity")["velocity"]
        return velocity

    def _run(self, piece: str, engine: Borrowed, there: Feeds, all_but: str = "") -> dict[str, Any]:
        """Run a piece on what it takes of all that is there; its outputs stay on the device but for one."""
        component = self._engines.bundle.component(piece)
        keep = [output for output in component.outputs if output != all_but]
        return engine.run({name: there[name] for name in component.inputs}, keep)

    def _weights(self, known: Sequence[Full]) -> tuple[float, float]:
        last, older = known[0].step, known[1].step if len(known) > 1 else None
        return weights(self._step, last, older, self._caching.order)

    def _is_full(self, wanted: bool, last: Full, moved: Array | None) -> bool:
        """Whether a step is full that need not be: what the first branch finds out holds for the others too."""
        if self._decided is None:
            self._decided = wanted
            if moved is not None and last.change is not None and self._caching.threshold is not None:
                self._decided = wanted or change(moved, last.change) >= self._caching.threshold
        return self._decided if self._caching.threshold is not None else wanted

    def _keep(self, key: Key, full: Full) -> None:
        """Keep what a full step left, and of those before the last one where two are extrapolated from."""
        for index, job in enumerate(self._group):
            before = [row for row in job.residuals.get(key, ()) if row.full.step < self._step]
            job.residuals[key] = (Row(full, index), *before[: self._caching.order])

    def _known(self, key: Key, engine: Borrowed) -> list[Full]:
        """What full steps before left of just these jobs, the last one first; brought together where they were not."""
        rows = [job.residuals.get(key, ()) for job in self._group]
        found = []
        for own in zip(*rows, strict=False):
            whole = own[0].full
            if any(row.full is not whole or row.index != index for index, row in enumerate(own)) or (
                len(own) != whole.residual.shape[0]
            ):
                whole = _gathered(own, engine)
            found.append(whole)
        for index, job in enumerate(self._group if found else ()):
            job.residuals[key] = tuple(Row(full, index) for full in found)
        return found


def _gathered(rows: Sequence[Row], engine: Borrowed) -> Full:
    """One for pictures of several, by way of the host."""
    arrays = {id(row.full): row.full.residual for row in rows}
    on_device = isinstance(rows[0].full.residual, Handle)
    if on_device:
        arrays = {key: engine.download(value) for key, value in arrays.items()}
    joined: Any = np.stack([arrays[id(row.full)][row.index] for row in rows])
    if on_device:
        joined = engine.upload({"residual": joined})["residual"]
    changes = [row.full.change[row.index] for row in rows if row.full.change is not None]
    return Full(rows[0].full.step, joined, np.stack(changes) if changes else None)
