"""Number formats of quantized weights and activations: how scales are chosen, and values rounded to them.

All formats are symmetric: a stored value times its scale is the number. Scales are rounded up to bfloat16 before any
value is divided by them, so that graphs in bfloat16 and in float32 dequantize to the same numbers.
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
"""The element type that scales are stored in, but for those that come from a quantized file."""
OWN_SCALE = "float32"
"""The element type of these, and of all others of their component."""
BLOCKS = (128, 64, 32, 16)
"""Block sizes of per-block scales, along the input of a linear: the first that divides its width is taken."""


@dataclass(frozen=True)
class Format:
    """A symmetric number format."""

    onnx: int
    """As in ``onnx.TensorProto.DataType``."""
    stored: str
    """The element type of its tensors in a safetensors file."""
    largest: float
    """The largest stored value."""
    round: Callable[[Array], NDArray[Any]]
    """Round scaled values, float32 of magnitudes up to ``largest``, to stored ones."""
    widen: Callable[[NDArray[Any]], Array]
    """Convert stored values to float32, without their scale."""
    blocks: bool = False
    """Whether weights have per-block scales; otherwise they have per-channel ones, one for each row."""
    bits: int = 0
    """How many bits an integer has; 0 where values are no integers."""


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
    """Pack two values in a byte, the first in the low half, as ONNX does."""
    nibbles = np.rint(values).astype(np.int8).view(np.uint8) & 15
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def _from_int4(stored: NDArray[Any]) -> Array:
    nibbles = np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:-1], -1).astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.float32)


INT8 = Format(3, "int8", 127.0, _to_int8, _from_int8, bits=8)
FLOAT8 = Format(17, "float8_e4m3fn", 448.0, _to_float8, _from_float8)
INT4 = Format(22, "uint8", 7.0, _to_int4, _from_int4, blocks=True, bits=4)


@dataclass(frozen=True)
class Scheme:
    """How a precision quantizes a linear."""

    weights: Format
    activations: Format | None = None
    """The format of its input, with one scale; None where inputs are not quantized."""
    smooth: float = 0.0
    """SmoothQuant's alpha: the share of the activations' outliers that goes to the weights, 0 to 1."""
    is_dynamic: bool = False
    """Whether kernels round each token of an input as it comes, with a scale of its own, which no graph tells."""


SCHEMES = {
    "fp8": Scheme(FLOAT8, FLOAT8),
    "int8": Scheme(INT8, INT8, smooth=0.5),
    "int8-dynamic": Scheme(INT8, is_dynamic=True),
    "int8-weights": Scheme(INT8),
    "int4-weights": Scheme(INT4),
}
"""Precision, as on the command line -> its scheme."""


def round_up(values: Array) -> Array:
    """Round positive numbers up to bfloat16; the result is float32. NaN and infinity stay what they are."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bfloat16_to_float32(((bits + 0xFFFF) >> 16).astype(np.uint16))
    return np.where(np.isfinite(values), rounded, values)  # The carry may make zero of a NaN.


def scale_of(absmax: Array, number_format: Format) -> Array:
    """The smallest bfloat16 scales that represent these largest magnitudes; 1 where all values are zero."""
    return round_up(np.where(absmax == 0, 1, np.maximum(absmax / number_format.largest, np.float32(1e-30))))


def fits(scales: Array, number_format: Format) -> bool:
    """Whether all that is stored with these scales is a finite bfloat16 number, times its scale."""
    with np.errstate(over="ignore"):
        largest = scales * np.float32(number_format.largest)
    return bool(np.isfinite(bfloat16_to_float32(float32_to_bfloat16(largest))).all())


def block_size(width: int) -> int | None:
    """The block size of a row of this width; None where no block size divides it."""
    return next((size for size in BLOCKS if width % size == 0), None)


def weight_scales(rows: Array, number_format: Format, blocks: int | None = None) -> Array:
    """The per-channel scales (out,), or per-block scales (out, blocks), of rows (out, in) of a weight.

    There are as many blocks as :func:`block_size` makes, where that is not given.
    """
    if number_format.blocks:
        rows = rows.reshape(len(rows), blocks or rows.shape[1] // (block_size(rows.shape[1]) or 1), -1)
    return scale_of(np.abs(rows).max(axis=-1), number_format)


def encode(values: Array, scales: Array, number_format: Format) -> NDArray[Any]:
    """Quantize rows (out, in) with the scales of :func:`weight_scales`; the result is as it is stored."""
    divided = values.reshape(*scales.shape, -1) / scales[..., None]
    divided = np.clip(divided, -number_format.largest, number_format.largest, out=divided)
    return number_format.round(divided.reshape(values.shape))


def decode(stored: NDArray[Any], scales: Array, number_format: Format) -> Array:
    """The numbers (out, in) that stored rows with the scales of :func:`weight_scales` stand for."""
    wide = number_format.widen(stored)
    shape = wide.shape
    wide = wide.reshape(scales.size, -1)
    wide *= scales.reshape(-1, 1)
    return wide.reshape(shape)


def stored_scales(scales: Array, dtype: str = SCALE) -> NDArray[Any]:
    """Convert scales to what they are stored as, in bfloat16 its bit patterns."""
    return float32_to_bfloat16(scales) if dtype == SCALE else scales
