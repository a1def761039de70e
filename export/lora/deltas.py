"""The algebra of LoRAs, some rows at a time, in float32.

With W (out, in), every change is a matrix of W's shape, times a factor (alpha / rank):

- LoRA: B A (Hu et al., 2021, https://arxiv.org/abs/2106.09685);
- LoHa: (B1 A1) * (B2 A2), element by element (Hyeon-Woo et al., 2021, https://arxiv.org/abs/2108.06098);
- LoKr: C ⊗ D, the Kronecker product, where each may be a product B A itself (Yeh et al., 2023,
  https://arxiv.org/abs/2309.14859);
- DoRA: W becomes m (W + change) / |W + change|, the norm over each row, or in some trainers over each column
  (Liu et al., 2024, https://arxiv.org/abs/2402.09353). Its change is the difference from W, so that scales and sums of
  several LoRAs mean what they mean for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import LoraError
from zimgkit.engines.tensors.dtypes import to_float32
from zimgkit.engines.tensors.safetensors import TensorInfo, view
from zimgkit.export.weights.addends import Matrix, Rows


class Change(Protocol):
    """A matrix that is computed when it is needed."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        ...

    def open(self) -> Rows:
        """Read what it is made of."""
        ...


@dataclass(frozen=True)
class Factor:
    """A matrix of a file, or the product of two.

    Raises:
        ValueError: the two do not fit.
    """

    left: TensorInfo
    right: TensorInfo | None = None

    def __post_init__(self) -> None:
        if self.right is not None and _shape(self.left)[1] != _shape(self.right)[0]:
            raise ValueError(f"{self.left.shape} does not fit {self.right.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return _shape(self.left)[0], _shape(self.right or self.left)[1]

    def open(self) -> Rows:
        """Read the matrices."""
        left = _values(self.left)
        if self.right is None:
            return lambda start, stop: left[start:stop]
        right = _values(self.right)
        return lambda start, stop: left[start:stop] @ right


class LowRank:
    """factor · up · down."""

    def __init__(self, up: TensorInfo, down: TensorInfo, factor: float) -> None:
        self._up, self._down = up, down
        self._factor = np.float32(factor)
        self.shape = Factor(up, down).shape

    def open(self) -> Rows:
        """Read the matrices."""
        up: Matrix = np.multiply(_values(self._up), self._factor, dtype=np.float32)
        down = _values(self._down)
        return lambda start, stop: up[start:stop] @ down


class Hadamard:
    """factor · one * two, element by element.

    Raises:
        ValueError: the two have different shapes.
    """

    def __init__(self, one: Factor, two: Factor, factor: float) -> None:
        if one.shape != two.shape:
            raise ValueError(f"{one.shape} does not fit {two.shape}")
        self._one, self._two = one, two
        self._factor = np.float32(factor)
        self.shape = one.shape

    def open(self) -> Rows:
        """Read the matrices."""
        one, two = self._one.open(), self._two.open()
        return lambda start, stop: self._factor * one(start, stop) * two(start, stop)


class Kronecker:
    """factor · one ⊗ two: row i of it is row i // n of one times row i % n of two, n being two's rows."""

    def __init__(self, one: Factor, two: Factor, factor: float) -> None:
        self._one, self._two = one, two
        self._factor = np.float32(factor)
        self.shape = (one.shape[0] * two.shape[0], one.shape[1] * two.shape[1])

    def open(self) -> Rows:
        """Read the matrices."""
        one = self._factor * self._one.open()(0, self._one.shape[0])
        two = self._two.open()(0, self._two.shape[0])

        def rows(start: int, stop: int) -> Matrix:
            index = np.arange(start, stop)
            left, right = one[index // len(two)], two[index % len(two)]
            return (left[:, :, None] * right[:, None, :]).reshape(len(index), -1)

        return rows


@dataclass(frozen=True)
class Slice:
    """Some rows of a change: what one of several weights gets that were one when the LoRA was trained."""

    change: Change
    first: int
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        """(count, in)."""
        return self.count, self.change.shape[1]

    def open(self) -> Rows:
        """Read what it is made of."""
        rows = self.change.open()
        return lambda start, stop: rows(self.first + start, self.first + stop)


@dataclass(frozen=True)
class Magnitude:
    """The norms that a DoRA gives the rows of a weight, or its columns."""

    info: TensorInfo
    of_columns: bool
    first: int = 0
    """The first row that is this weight's."""

    def values(self) -> Matrix:
        """All of them, flat."""
        return _values(self.info).reshape(-1)[self.first :]


@dataclass(frozen=True)
class Addend:
    """What one LoRA does to one tensor."""

    change: Change
    scale: float
    magnitude: Magnitude | None = None
    label: str = "a LoRA"
    """What to call it in messages: its file and the module."""

    def open(self, read: Rows, bounds: Sequence[tuple[int, int]]) -> Callable[[int, Matrix], Matrix]:
        """Read its matrices; the result gives from (first row, rows of W) what is added to them.

        Args:
            read: gives rows of W.
            bounds: of the rows to read at a time, where all of W is needed first.

        Raises:
            LoraError: a DoRA gives zeros a norm; the result raises it where the norms are those of rows.
        """
        rows, scale = self.change.open(), np.float32(self.scale)

        def changed(start: int, base: Matrix) -> Matrix:
            whole: Matrix = rows(start, start + len(base)) + base
            return whole

        if self.magnitude is None:
            return lambda start, base: scale * rows(start, start + len(base))
        magnitude = self.magnitude.values()
        if self.magnitude.of_columns:
            squares = np.zeros(self.change.shape[1])
            for start, stop in bounds:
                squares += np.square(changed(start, read(start, stop)), dtype=np.float64).sum(axis=0)
            ratio = self._ratio(magnitude, np.sqrt(squares), "column", 0)
            return lambda start, base: scale * (changed(start, base) * ratio - base)

        def by_rows(start: int, base: Matrix) -> Matrix:
            whole = changed(start, base)
            norms = np.sqrt(np.square(whole, dtype=np.float64).sum(axis=1))
            ratio = self._ratio(magnitude[start : start + len(base)], norms, "row", start)
            difference: Matrix = scale * (whole * ratio[:, None] - base)
            return difference

        return by_rows

    def _ratio(self, magnitude: Matrix, norms: NDArray[np.float64], kind: str, first: int) -> Matrix:
        """What rows or columns are multiplied by to get these norms; 0 where they are zeros and stay that.

        Peft divides by zero here: https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/dora.py.
        """
        zero = norms == 0
        if (bad := np.flatnonzero(zero & (magnitude != 0))).size:
            count = f"{bad.size} {kind}{'s' * (bad.size > 1)} of zeros"
            message = f"{self.label}: its DoRA gives {count} another norm than 0 (the first is {kind} {first + bad[0]})"
            raise LoraError(message, "no factor makes that of zeros: train it again")
        return np.divide(magnitude, norms, out=np.zeros_like(norms), where=~zero).astype(np.float32)


def _shape(info: TensorInfo) -> tuple[int, int]:
    """As a matrix: kernels of one pixel count as one."""
    if len(info.shape) < 2 or math.prod(info.shape[2:]) != 1:
        raise ValueError(f"{info.name} has shape {info.shape}, which is no matrix")
    return info.shape[0], info.shape[1]


def _values(info: TensorInfo) -> Matrix:
    values: Matrix = to_float32(view(info), info.dtype)
    return values.reshape(_shape(info)) if len(info.shape) > 2 else values
