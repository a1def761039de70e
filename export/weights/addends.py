"""What is added to a matrix on its way from a checkpoint to a bundle, some rows at a time, in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Rows = Callable[[int, int], Matrix]
"""``rows(start, stop)``: those rows of a matrix, float32."""


class Addend(Protocol):
    """A change of one matrix, such as a LoRA's."""

    @property
    def label(self) -> str:
        """What to call it in messages."""
        ...

    def open(self, read: Rows, bounds: Sequence[tuple[int, int]]) -> Callable[[int, Matrix], Matrix]:
        """Read what it is made of; the result gives from (first row, rows of W) what is added to them.

        Args:
            read: gives rows of W.
            bounds: of the rows to read at a time, where all of W is needed first.
        """
        ...


Addends = Mapping[str, Mapping[str, tuple[Addend, ...]]]
"""Component of the checkpoint -> canonical name of a tensor -> what is added to it."""


def merged(read: Rows, bounds: Sequence[tuple[int, int]], addends: Sequence[Addend]) -> Rows:
    """W with everything added, in the order of the addends, as rows that are computed when they are asked for.

    Args:
        read: gives rows of W, float32.
        bounds: of the rows to read at a time, where all of W is needed first.
        addends: what is added; one or more.
    """
    first, *others = [addend.open(read, bounds) for addend in addends]

    def rows(start: int, stop: int) -> Matrix:
        base = read(start, stop)
        total = first(start, base)
        for add in others:
            total += add(start, base)
        total += base
        return total

    return rows
