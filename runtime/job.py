"""One picture under way, and what its steps share with those of other pictures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.base import Feeds, Handle
from zimgkit.engines.bundle import Control
from zimgkit.engines.errors import CancelledError
from zimgkit.runtime.controls import ControlInput, scales
from zimgkit.runtime.diffusion.blending import Kept
from zimgkit.runtime.families import Family
from zimgkit.runtime.request import Request

Array = NDArray[np.float32]


class Uploads(Protocol):
    """What conditions are brought to a device with."""

    @property
    def device(self) -> str:
        """Which device."""

    def upload(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, Handle]:
        """Copy arrays there."""


class Conditions:
    """What a prompt adds to every step of its pictures: inputs of the denoiser that stay the same.

    All jobs of a prompt share one of these. Its inputs are uploaded when the first of them takes its first step, and
    leave the device with the last of them, when nothing refers to this any more.

    Args:
        make: computes the inputs when they are first needed.
        component: which denoiser takes them.
    """

    def __init__(self, make: Callable[[], Mapping[str, NDArray[Any]]], component: str = "denoiser") -> None:
        self.component = component
        self._make = make
        self._lock = threading.Lock()
        self._uploaded: tuple[str, Feeds] | None = None

    def on(self, engine: Uploads) -> Feeds:
        """The inputs as handles on an engine's device."""
        with self._lock:
            if self._uploaded is None or self._uploaded[0] != engine.device:
                self._uploaded = engine.device, engine.upload(self._make())
            return self._uploaded[1]


@dataclass(frozen=True, eq=False)
class Controls:
    """What ControlNets add to the steps of a prompt's pictures, in both branches of guidance."""

    conditions: Conditions
    """Inputs of the denoiser that has them which stay the same."""
    nets: tuple[ControlInput, ...]
    silent: Feeds
    """The scales, 0, of those that it has and that are not asked for: name -> float32 (1,)."""
    entries: tuple[Control, ...] = ()
    """Theirs in the manifest."""
    alternates: bool = True
    """Whether the plain denoiser takes the steps in which none acts; else they act at 0, which gives the same."""

    def timed(self, family: Family, sigma: float) -> Feeds:
        """What the nets take at a noise level."""
        return {
            f"{key}.{net.name}": value
            for net in self.entries
            for key, value in family.control_step_inputs(net, sigma).items()
        }

    def at(self, step: int, steps: int) -> Feeds | None:
        """The scale of each net in a step of so many; None where the plain denoiser takes it."""
        if self.alternates and not any(net.acts(step, steps) for net in self.nets):
            return None
        return {f"scale.{name}": value for name, value in {**scales(self.nets, step, steps), **self.silent}.items()}


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise levels of a run, and what follows from them alone. All jobs of a request share it."""

    sigmas: Array
    """Float32 (steps + 1,), the last one 0."""
    inputs: Callable[[int], Feeds]
    """Step -> inputs of the denoiser."""

    def __len__(self) -> int:
        return len(self.sigmas) - 1


def _nothing() -> None:
    """There is nothing to release."""


@dataclass(eq=False)
class Job:
    """One picture under way. One thread at a time may step it; any may cancel it."""

    request: Request
    index: int
    """Which of the request's pictures."""
    latents: Array
    """Float32 (1, ...), in the form the reference pipeline keeps them."""
    schedule: Schedule
    positive: Conditions | None
    """None once nothing is left to denoise."""
    negative: Conditions | None
    controls: Controls | None = None
    kept: Kept | None = None
    """What a mask keeps of the picture it starts from."""
    on_release: Callable[[], object] = field(default=_nothing, repr=False)
    """Called when the job needs the denoiser no more; a second call does nothing."""
    step: int = 0
    """Steps that are done."""
    denoised: Array | None = None
    """After a step: the clean latents that it aimed at."""
    velocity: Array | None = None
    """After a step: what it moved along."""
    cancelled: bool = False
    residuals: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What full steps left for others, where there is a cache, see :mod:`zimgkit.runtime.caching`."""

    @property
    def components(self) -> list[str]:
        """The denoisers that it takes steps with."""
        control = self.controls
        used = [control.conditions] if control else []
        if control is None or control.alternates:
            used += [conditions for conditions in (self.positive, self.negative) if conditions]
        return sorted({conditions.component for conditions in used})

    @property
    def is_denoised(self) -> bool:
        """Whether all steps are done."""
        return self.step == len(self.schedule)

    @property
    def sigma(self) -> float:
        """The noise level of the latents now."""
        return float(self.schedule.sigmas[self.step])

    @property
    def progress(self) -> float:
        """The share of steps that are done, from 0 to 1."""
        return self.step / len(self.schedule)

    def cancel(self) -> None:
        """Take no further step. One that another thread is taking now is finished; its result is not used."""
        self.cancelled = True
        self.release()

    def check(self) -> None:
        """Refuse to go on with what was cancelled.

        Raises:
            CancelledError: it was.
        """
        if self.cancelled:
            raise CancelledError(f"picture {self.index + 1} of {self.request.batch} was cancelled")

    def release(self) -> None:
        """Let go of the conditions and the denoiser; a second call does nothing."""
        self.positive = self.negative = self.controls = None
        self.residuals.clear()
        self.on_release()
