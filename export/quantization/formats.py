"""Number formats of quantized weights and activations: how scales are chosen, and values rounded to them.

Symmetric all of them: a stored value times its scale is the number. Scales are rounded up to bfloat16 before any value
is divided by them, so that a graph that computes in bfloat16 and one in float32 see the very same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.tensors.dtypes import bfloat16_to_float32, float32_to_bfloat16

Array = NDArray[np.float32]

SCALE = "bfloat16"
"""The element type that scales are stored in."""
BLOCKS = (128, 64, 32, 16)
"""How many neighbours along the input of a linear share a scale, in formats of blocks: the first that divides it."""


@dataclass(frozen=True)
class Format:
    """A symmetric number format."""

    onnx: int
    """As in ``onnx.TensorProto.DataType``."""
    stored: str
    """The element type of its tensors in a safetensors file."""
    largest: float
    """The largest number before scaling."""
    round: Callable[[Array], NDArray[Any]]
    """Numbers within the largest, to what is stored."""
    widen: Callable[[NDArray[Any]], Array]
    """What is stored, to numbers."""
    blocks: bool = False
    """Whether scales are for blocks of a row, not for whole rows."""


def _to_int8(values: Array) -> NDArray[Any]:
    return np.rint(values).astype(np.int8)


def _from_int8(stored: NDArray[Any]) -> Array:
    return stored.astype(np.float32)


def _to_float8(values: Array) -> NDArray[Any]:
    return values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def _from_float8(stored: NDArray[Any]) -> Array:
    values: Array = stored.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return values


def _to_int4(values: Array) -> NDArray[Any]:
    """Two to a byte, the first in the low half, as ONNX packs them."""
    nibbles = np.rint(values).astype(np.int8).view(np.uint8) & 15
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def _from_int4(stored: NDArray[Any]) -> Array:
    nibbles = np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:-1], -1).astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.float32)


INT8 = Format(3, "int8", 127.0, _to_int8, _from_int8)
FLOAT8 = Format(17, "float8_e4m3fn", 448.0, _to_float8, _from_float8)
INT4 = Format(22, "uint8", 7.0, _to_int4, _from_int4, blocks=True)


@dataclass(frozen=True)
class Scheme:
    """What a precision does to a linear."""

    weights: Format
    activations: Format | None = None
    """Of its input; None where it stays as it is."""
    smooth: float = 0.0
    """SmoothQuant's alpha: how much of the activations' outliers goes to the weights."""


SCHEMES = {
    "fp8": Scheme(FLOAT8, FLOAT8),
    "int8": Scheme(INT8, INT8, smooth=0.5),
    "int8-weights": Scheme(INT8),
    "int4-weights": Scheme(INT4),
}
"""Name on the command line -> what it does."""


def round_up(values: Array) -> Array:
    """The least bfloat16 numbers that are not below these positive ones, as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return bfloat16_to_float32(((bits + 0xFFFF) >> 16).astype(np.uint16))


def scale_of(absmax: Array, number_format: Format) -> Array:
    """The scales by which the largest magnitudes just fit; 1 where all is zero."""
    return round_up(np.where(absmax == 0, 1, np.maximum(absmax / number_format.largest, np.float32(1e-30))))


def block_of(width: int) -> int | None:
    """How many neighbours of a row of this width share a scale: None where no size will do."""
    return next((size for size in BLOCKS if width % size == 0), None)


def weight_scales(rows: Array, number_format: Format) -> Array:
    """The scales of some rows (out, in) of a weight: (out,), or (out, blocks) in formats of blocks."""
    if number_format.blocks:
        rows = rows.reshape(len(rows), -1, block_of(rows.shape[1]) or 1)
    return scale_of(np.abs(rows).max(axis=-1), number_format)


def encode(values: Array, scales: Array, number_format: Format) -> NDArray[Any]:
    """Round rows (out, in) to what is stored, by the scales of :func:`weight_scales`."""
    divided = values.reshape(*scales.shape, -1) / scales[..., None]
    divided = np.clip(divided, -number_format.largest, number_format.largest, out=divided)
    return number_format.round(divided.reshape(values.shape))


def stored_scales(scales: Array) -> NDArray[np.uint16]:
    """Scales as they are stored: the bit patterns of bfloat16."""
    return float32_to_bfloat16(scales)
