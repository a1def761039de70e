"""Block caching: which steps of a schedule are computed in full, and what the others take over from these.

A step's first block is always computed; the others change the image tokens by a residual that differs little from one
step to the next. A cached step adds that of the last full one (DBCache of https://github.com/vipshop/cache-dit), or
what the last two extrapolate to (TaylorSeer, https://github.com/Shenyi-Z/TaylorSeer). Which steps are full is a fixed
mask, so that time and picture are the same on every backend, or follows from how much the first block's own residual
has changed (First Block Cache, https://github.com/chengzeyi/ParaAttention).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import CacheMask
from zimgkit.engines.errors import UsageError

Mask = tuple[bool, ...]
"""For each step, whether it is computed in full."""

OFF, DYNAMIC = "off", "dynamic"
RESIDUAL, VELOCITY = REUSED = ("residual", "velocity")
"""What is taken over from full steps: what the body added to the first block's stream, or what all of it gave."""
PATTERNS = {"balanced": (8, 3), "fast": (4, 4)}
"""Name -> how many steps are full at first, and of how many one is full afterwards."""
SHORTEST = 12
"""Where so few steps are taken, or fewer, only a mask that is of just as many saves any."""
THRESHOLD = 0.12
"""Of the relative change of the first block's residual, where none is given."""
WARM_UP = 4
"""Steps that are full at first where the change decides."""


@dataclass(frozen=True)
class Caching:
    """Which steps of a run are full."""

    positive: Mask
    """Of the prompt's branch; where there is a threshold, those that are full whatever has changed."""
    negative: Mask
    """Of the negative prompt's."""
    order: int = 1
    """Of the extrapolation."""
    reuse: str | None = None
    """One of :data:`REUSED`; None for the residual where the denoiser is cut, else the velocity."""
    threshold: float | None = None
    """Of the change, where that decides, for both branches alike."""
    notes: tuple[str, ...] = ()
    """What the caller should know."""

    @property
    def saves(self) -> bool:
        """Whether any step may be left out."""
        return not all(self.positive + self.negative)


def caching(
    cache: str,
    steps: int,
    caches: Mapping[str, CacheMask] = {},
    negative: str | None = None,
    order: int | None = None,
    reuse: str | None = None,
) -> Caching | None:
    """What a call asks for.

    Args:
        cache: ``off``, ``balanced``, ``fast``, ``dynamic``, ``dynamic:`` and a threshold, a digit for each step, or
            the name of a mask in the bundle, which may replace ``balanced`` and ``fast``.
        steps: how many are taken.
        caches: the masks in the bundle, by name.
        negative: likewise of the negative branch, without ``dynamic``; as the other where it is None.
        order: of the extrapolation; where it is None the mask's own, or 1.
        reuse: what is taken over; where it is None what the mask was measured with, if anything.

    Returns:
        None where every step is full.

    Raises:
        UsageError: there is no such mask, or it does not fit the steps.
    """
    kind, colon, threshold = cache.partition(":")
    if kind == DYNAMIC:
        if negative is not None:
            message = f"cache_negative is {negative[:80]!r}, and {DYNAMIC} decides for both branches"
            raise UsageError(message, "leave one of them out")
        limit = _threshold(threshold) if colon else THRESHOLD
        full = tuple(steps <= SHORTEST or index < WARM_UP or index == steps - 1 for index in range(steps))
        if reuse == VELOCITY:
            raise UsageError(f"{DYNAMIC} decides by the first block, which is not run where a velocity is reused")
        return Caching(full, full, 1 if order is None else order, reuse, limit, _too_few(cache, steps))
    own = caches.get(cache)
    positive, notes = _mask("cache", cache, steps, own.steps if own else None)
    parameter, value = ("cache", cache) if negative is None else ("cache_negative", negative)
    other = caches.get(value)
    away, more = _mask(parameter, value, steps, other.negative or other.steps if other else None)
    if order is None:
        order = own.order if own else 1
    reuse = reuse or (own.reuse if own else None)
    found = Caching(positive, away, order, reuse, notes=tuple(dict.fromkeys(notes + more)))
    return found if found.saves or found.notes else None


def pattern(first: int, one_of: int, steps: int) -> Mask:
    """So many full steps, then one of so many, and the last one."""
    regular = [index < first or (index - first + 1) % one_of == 0 for index in range(steps)]
    return (*regular[:-1], True)


def resampled(mask: Mask, steps: int) -> Mask:
    """A mask for another number of steps: the same share of them is full in every part of the schedule.

    The first and the last step are full.
    """
    done = np.concatenate([[0], np.cumsum(mask)])
    places = np.arange(steps + 1) * len(mask) / steps
    counts = np.floor(np.interp(places, np.arange(len(done)), done) * steps / len(mask) + 0.5)
    full = np.diff(counts) > 0
    full[[0, -1]] = True
    return tuple(map(bool, full))


def weights(step: int, last: int, older: int | None, order: int) -> tuple[float, float]:
    """Of the residuals of the last full step and of the one before it, for a step.

    Args:
        step: which.
        last: the last full one; ``step`` itself where that is full.
        older: the one before it, if any.
        order: of the extrapolation.
    """
    if order == 0 or older is None or step == last:
        return 1.0, 0.0
    share = (step - last) / (last - older)
    return 1 + share, -share


def change(now: NDArray[np.float32], last: NDArray[np.float32]) -> float:
    """The mean difference from another array, relative to that one's mean magnitude."""
    magnitude = float(np.abs(last).mean())
    return float(np.abs(now - last).mean()) / magnitude if magnitude else float("inf")


def _mask(parameter: str, value: str, steps: int, own: str | None) -> tuple[Mask, tuple[str, ...]]:
    """A mask, and what to say of it; the bundle's own where there is one of this name."""
    notes = _too_few(value, steps)
    if own is not None and value in PATTERNS and _read(own) == pattern(*PATTERNS[value], len(own)):
        own = None  # The bundle has it for what it costs, and it is laid out anew for any number of steps.
    if own is not None:
        found = _read(own)
        if len(found) == steps:
            return found, ()
        if not notes:
            notes = (f"the mask {value!r} is of {len(found)} steps, and is stretched to {steps}",)
            return resampled(found, steps), notes
    elif value == OFF:
        return (True,) * steps, ()
    elif re.fullmatch("[01]+", value):
        if len(value) != steps:
            message = f"{parameter} is a mask of {len(value)} steps, and {steps} are taken"
            raise UsageError(message, "give a digit for each")
        if value[0] == "0":
            raise UsageError(f"{parameter} leaves out the first step", "begin it with 1")
        return _read(value), ()
    elif value not in PATTERNS:
        hint = f"choose {OFF}, {', '.join(PATTERNS)}, {DYNAMIC}, or a 1 or a 0 for each step"
        raise UsageError(f"{parameter} is {value[:80]!r}", hint)
    return ((True,) * steps, notes) if notes else (pattern(*PATTERNS[value], steps), ())


def _read(digits: str) -> Mask:
    return tuple(digit == "1" for digit in digits)


def _too_few(value: str, steps: int) -> tuple[str, ...]:
    """What to say where a cache would do more harm than good."""
    if steps > SHORTEST:
        return ()
    return (f"the cache {value!r} is off, for {steps} steps are too few; a mask of {steps} digits is taken as it is",)


def _threshold(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 1:
        raise UsageError(f"cache is '{DYNAMIC}:{text[:80]}'", "give a threshold above 0 and below 1, such as 0.12")
    return found
