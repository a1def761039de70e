"""A request under way: what is asked for, and what happens to it, told to who waits for it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.runtime.job import Job
from zimgkit.runtime.request import Request
from zimgkit.runtime.serve.catalog import Model
from zimgkit.runtime.serve.events import Progress
from zimgkit.runtime.serve.tracing import current

Pixels = NDArray[np.float32]
_numbers = itertools.count(1)


@dataclass(frozen=True)
class PreviewPixels:
    """What a picture would be now, float32 (H, W, 3) from 0 to 1."""

    picture: int
    pixels: Pixels = field(repr=False)


@dataclass(frozen=True)
class FinishedPixels:
    """A picture is there, float32 (H, W, 3), or (layers, H, W, 4) where one is taken apart."""

    picture: int
    pixels: Pixels = field(repr=False)


@dataclass(frozen=True)
class Failed:
    """Nothing more comes."""

    error: BaseException


@dataclass(frozen=True)
class Done:
    """All pictures are there."""


Event = Progress | PreviewPixels | FinishedPixels | Failed | Done
"""What a device's thread tells."""


@dataclass(eq=False)
class Drawing:
    """One request on its way to pictures.

    Another thread may cancel it at any time: no further step is taken then.
    """

    model: Model
    request: Request
    client: str
    """Whose turn it takes."""
    tell: Callable[[Event], object] = field(repr=False)
    """Called from the device's thread with what happens."""
    request_id: str = ""
    partial_images: int = 0
    """How many previews of each picture are wanted."""
    seconds: float = 0.0
    """How long it is likely to take."""
    number: int = field(default_factory=lambda: next(_numbers))
    asked: float = field(default_factory=time.monotonic)
    trace: Any = field(default_factory=current, repr=False)
    """What its spans are begun under, though in another thread."""
    begun: float | None = None
    """When its first step could be taken."""
    steps: int = 0
    """Steps that are taken, of all its pictures."""
    total: int = 1
    preview: Pixels | None = field(default=None, repr=False)
    """The newest."""
    preview_wanted: bool = False
    """Whether one is to be made after the next step."""
    cancelled: bool = False
    _jobs: list[Job] = field(default_factory=list, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def under_way(self, jobs: list[Job]) -> None:
        """Its pictures are begun; they are cancelled at once where it was before."""
        with self._lock:
            self._jobs, self.total = jobs, sum(len(job.schedule) for job in jobs)
            if self.cancelled:
                self._cancel()

    def update(self, progress: Progress) -> None:
        """Take over how far it is, where another process draws it."""
        self.steps, self.total = progress.steps, progress.total
        self.begun = self.begun or time.monotonic()

    def cancel(self) -> None:
        """Draw no further."""
        with self._lock:
            self.cancelled = True
            self._cancel()

    def _cancel(self) -> None:
        for job in self._jobs:
            job.cancel()

    def release(self) -> None:
        """Let go of what its pictures hold on the device."""
        for job in self._jobs:
            job.release()
        self._jobs = []

    def preview_steps(self, steps: int) -> set[int]:
        """After which steps previews are made: evenly spread, none after the last."""
        wanted = min(self.partial_images, steps - 1)
        return {round(steps * (index + 1) / (wanted + 1)) for index in range(wanted)} - {0, steps}
