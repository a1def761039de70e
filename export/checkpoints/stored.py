"""Tensors of a checkpoint as they can be read: a range of bytes in a file, or what is made of such ranges, by rows.

A tensor that lies in a file as it is needed stays a :class:`TensorInfo`, which can be linked. What has another name in
its file, is a part of a larger tensor, or is multiplied by scales is :class:`Decoded`; it is made when it is read, so
many rows at a time as a reader asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.tensors.dtypes import BY_NAME
from zimgkit.engines.tensors.safetensors import TensorInfo

ReadRows = Callable[[int, int], NDArray[Any]]
"""``rows(start, stop)``: those rows of a tensor, (stop - start, width), in the storage type of its element type."""


@dataclass(frozen=True)
class Integers:
    """The integers of a quantized matrix and their scales, as a file has them: values are their products."""

    bits: int
    """8 or 4."""
    blocks: int
    """How many scales each row has."""
    rows: ReadRows
    """Rows of the integers, int8."""
    scales: ReadRows
    """The scales of rows, (stop - start, blocks) float32."""


@dataclass(frozen=True)
class Decoded:
    """A tensor that no file holds as it is."""

    name: str
    """What it is called; in a bundle too."""
    dtype: str
    """The element type of its values."""
    shape: tuple[int, ...]
    stored: tuple[TensorInfo, ...]
    """What it is made of: the values, and then scales and the like."""
    rows: ReadRows
    """Rows go along the first axis; all others make their width."""
    encoding: str = ""
    """What the values are stored in, for people, where that is no element type alone."""
    integers: Integers | None = None
    """What they are products of, where it is no more than that."""

    @property
    def file(self) -> Path:
        """The file of its values."""
        return self.stored[0].file

    @property
    def nbytes(self) -> int:
        """Bytes of its values once they are decoded."""
        return math.prod(self.shape) * BY_NAME[self.dtype].storage.itemsize


Stored: TypeAlias = TensorInfo | Decoded
"""A tensor of a checkpoint."""


def row_count(shape: tuple[int, ...]) -> int:
    """How many rows a tensor has; a scalar is one."""
    return shape[0] if shape else 1


def row_width(shape: tuple[int, ...]) -> int:
    """How many elements a row has."""
    return math.prod(shape[1:])


def tensor_rows(tensor: Stored, start: int, stop: int) -> NDArray[Any]:
    """Read some rows of a tensor, (stop - start, width), in the storage type of its element type.

    Raises:
        OSError: the file ended early.
    """
    if isinstance(tensor, Decoded):
        return tensor.rows(start, stop)
    width = row_width(tensor.shape)
    return read_elements(tensor, start * width, stop * width).reshape(stop - start, width)


def read_elements(info: TensorInfo, start: int, stop: int) -> NDArray[Any]:
    """Read some elements of a tensor as it is stored, flat.

    Read, not mapped, so that what was read does not stay resident.

    Raises:
        OSError: the file ended early.
    """
    storage = BY_NAME[info.dtype].storage
    found = np.fromfile(info.file, storage, stop - start, offset=info.offset + start * storage.itemsize)
    if found.size < stop - start:
        raise OSError(f"{info.file} ended early")
    return found


def part_of(tensor: Stored, name: str, shape: tuple[int, ...], first: int = 0) -> Decoded:
    """Some rows of a tensor, or all of them, as a tensor of another name and perhaps another shape.

    Args:
        tensor: the whole.
        name: of the part.
        shape: of the part; its rows are as wide as those of the whole.
        first: its first row in the whole.
    """

    def rows(start: int, stop: int) -> NDArray[Any]:
        return tensor_rows(tensor, first + start, first + stop)

    if isinstance(tensor, Decoded):
        integers = tensor.integers and _later(tensor.integers, first)
        return replace(tensor, name=name, shape=shape, rows=rows, integers=integers)
    return Decoded(name, tensor.dtype, shape, (tensor,), rows)


def _later(integers: Integers, first: int) -> Integers:
    """The same from a row on."""
    return replace(
        integers,
        rows=lambda start, stop: integers.rows(first + start, first + stop),
        scales=lambda start, stop: integers.scales(first + start, first + stop),
    )
