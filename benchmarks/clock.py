"""What a picture and its parts take: the words of ``cpu_peers.py``, and a clock."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

STEP = "denoising step"
COMPONENTS = ("text encoder", STEP, "VAE decoder")
READERS = ("vision encoder", "VAE encoder")
"""What reads the pictures that are edited."""
WHOLE = "whole pipeline"


class Spent(NamedTuple):
    """What something took."""

    seconds: float
    """Of the clock on the wall."""
    cpu_seconds: float
    """Of all threads of a process."""

    def since(self, start: Spent) -> Spent:
        """What was spent between two readings of the clocks."""
        return Spent(self.seconds - start.seconds, self.cpu_seconds - start.cpu_seconds)


def now() -> Spent:
    """The clocks, of this process."""
    return Spent(time.perf_counter(), time.process_time())


class Clock:
    """Adds up the time spent in wrapped functions, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, Spent] = defaultdict(lambda: Spent(0, 0))

    def add(self, name: str, spent: Spent) -> None:
        """Add what was spent."""
        self.spent[name] = Spent(*map(sum, zip(self.spent[name], spent, strict=True)))

    def time(self, name: str, function: Callable[..., Any], within: str | None = None) -> Callable[..., Any]:
        """The same function, timed; what it takes is no part of what it is called within."""

        def timed(*arguments: Any, **options: Any) -> Any:
            start = now()
            try:
                return function(*arguments, **options)
            finally:
                spent = now().since(start)
                self.add(name, spent)
                if within:
                    self.add(within, Spent(*(-value for value in spent)))

        return timed
