"""Which steps of a schedule to compute in full, so that the others do the least harm: a shortest path.

Each step that is left out moves the latents otherwise than it should. How far, is known for every pair of full steps
that may come before it (:mod:`.step_errors`); what all of them add up to bounds the error of the latents at the end.
So full steps are the stations of a path from the first step to the last one, and the best mask of so many full steps is
the shortest path of so many stations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

Pair = tuple[int, int | None]
"""The last full step and the one before it; None where that is not looked at, or there is none."""
Errors = Mapping[tuple[Pair, int], float]
"""The full steps before a step that is left out, and that step -> how far off it then moves the latents."""
LONGEST = 7
"""How many steps may be left out in a row."""


def pairs(step: int, order: int) -> Iterator[Pair]:
    """The full steps that may come before a step that is left out.

    Args:
        step: from 1.
        order: of the extrapolation; the one before the last counts for 1 alone.
    """
    for last in range(max(0, step - LONGEST), step):
        if order and last:
            yield from ((last, older) for older in range(max(0, last - LONGEST - 1), last))
        else:
            yield last, None


def fewest(steps: int) -> int:
    """How many steps must be full: the first, the last, and one after every :data:`LONGEST`."""
    return 1 + -(-(steps - 1) // (LONGEST + 1))


def total(mask: str, errors: Errors, order: int) -> float:
    """What the errors of a mask add up to; no more than :data:`LONGEST` steps in a row are left out.

    Args:
        mask: a digit for each step, 1 where it is full, as the first one is.
        errors: of all :func:`pairs` of all steps.
        order: of the extrapolation.
    """
    found = 0.0
    pair: Pair = (0, None)
    for step, digit in enumerate(mask[1:], start=1):
        if digit == "1":
            pair = step, pair[0] if order else None
        else:
            found += errors[pair, step]
    return found


def best_mask(errors: Errors, steps: int, full: int, order: int) -> tuple[str, float]:
    """The mask of so many full steps whose errors add up to the least.

    Args:
        errors: of all :func:`pairs` of all steps.
        steps: how many there are, 2 or more.
        full: how many of them are full, the first and the last among them; at least :func:`fewest`.
        order: of the extrapolation.

    Returns:
        A digit for each step, 1 where it is full, and the sum of the errors.
    """
    # By the last two full steps: what is paid until there, and the mask.
    reached: dict[Pair, tuple[float, str]] = {(0, None): (0.0, "1")}
    for _ in range(full - 1):
        longer: dict[Pair, tuple[float, str]] = {}
        for pair, (before, mask) in reached.items():
            last, paid = pair[0], before
            for after in range(last + 1, min(last + LONGEST + 2, steps)):
                found = paid, f"{mask}{'0' * (after - last - 1)}1"
                key = after, last if order else None
                longer[key] = min(longer.get(key, found), found)
                paid += errors[pair, after] if after - last <= LONGEST else 0.0
        reached = longer
    paid, mask = min(found for pair, found in reached.items() if pair[0] == steps - 1)
    return mask, paid
