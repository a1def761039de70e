"""Element types: one table of names, and bfloat16 for numpy, which has none of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class DType(NamedTuple):
    """One element type as the three formats in play call it."""

    name: str
    """As in torch and in the manifest, for example ``"bfloat16"``."""
    safetensors: str
    """As in a safetensors header, for example ``"BF16"``."""
    onnx: int
    """As in ``onnx.TensorProto.DataType``."""
    storage: np.dtype[Any]
    """The numpy type that holds its bytes; an unsigned integer where numpy has no such type."""


DTYPES = (
    DType("float32", "F32", 1, np.dtype("<f4")),
    DType("bfloat16", "BF16", 16, np.dtype("<u2")),
    DType("float16", "F16", 10, np.dtype("<f2")),
    DType("float64", "F64", 11, np.dtype("<f8")),
    DType("int64", "I64", 7, np.dtype("<i8")),
    DType("int32", "I32", 6, np.dtype("<i4")),
    DType("int16", "I16", 5, np.dtype("<i2")),
    DType("int8", "I8", 3, np.dtype("i1")),
    DType("uint8", "U8", 2, np.dtype("u1")),
    DType("bool", "BOOL", 9, np.dtype("?")),
    DType("float8_e4m3fn", "F8_E4M3", 17, np.dtype("u1")),
    DType("float8_e5m2", "F8_E5M2", 19, np.dtype("u1")),
)
BY_NAME = {dtype.name: dtype for dtype in DTYPES}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES}
BY_ONNX = {dtype.onnx: dtype for dtype in DTYPES}


def bfloat16_to_float32(bits: NDArray[np.uint16], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Widen bfloat16, given as its 16-bit patterns, to float32 exactly; any shape, into ``out`` of it where given."""
    wide = np.empty(bits.shape, np.uint32) if out is None else out.view(np.uint32)
    np.copyto(wide, bits)
    np.left_shift(wide, 16, out=wide)
    return wide.view(np.float32)


def float32_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to the nearest bfloat16, ties to even, as torch does; returns 16-bit patterns, any shape."""
    bits = np.asarray(values, np.float32, order="C").view(np.uint32)
    # One array for all steps: this is what casting a checkpoint spends its time on.
    rounded = np.asarray(bits >> 16)
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    result = np.asarray(rounded.astype(np.uint16))
    if (nan := np.isnan(values)).any():
        # The carry would turn a NaN with a full mantissa into an infinity.
        result[nan] = 0x7FC0
    return result


def round_to(values: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """Round float32 values to what ``name`` ("float32" or "bfloat16") can hold, still as float32."""
    return bfloat16_to_float32(float32_to_bfloat16(values)) if name == "bfloat16" else values


def to_float32(stored: NDArray[Any], name: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Widen stored weights of type ``name`` to float32; a view where they are float32 already.

    Args:
        stored: any shape.
        name: their element type.
        out: float32 of that shape, where bfloat16 goes.
    """
    if name == "bfloat16":
        return bfloat16_to_float32(stored, out)
    if name.startswith("float8"):
        raise TypeError(f"{name} is stored as bit patterns, which have no widening here")
    return np.asarray(stored, dtype=np.float32)
