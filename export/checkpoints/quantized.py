"""Quantized weights of other tools, as tensors that are decoded while they are read.

Each of :data:`DECODERS` looks at one stored tensor and those beside it. Values are decoded in float32, so that a
bundle's own rounding is the only one.

Sources: comfy/quant_ops.py and comfy/ops.py of ComfyUI; ``int8_utils.py`` of comfy-kitchen for the rotation
(arXiv:2512.03673); ``functional.py`` of bitsandbytes; ``QTensor`` of optimum-quanto.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import CheckpointError
from zimgkit.engines.tensors.dtypes import to_float32
from zimgkit.engines.tensors.safetensors import TensorInfo, read_metadata
from zimgkit.export.checkpoints.stored import (
    Decoded,
    Integers,
    Stored,
    read_elements,
    row_count,
    row_width,
    tensor_rows,
)

Array = NDArray[np.float32]
Tensors = Mapping[str, Stored]

SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
"""What the scales of ``<module>.weight`` are called after the module."""
UNREAD = (
    *("scale_input", "input_scale", "scale_output", "output_scale", "comfy_quant", "weight_format"),
    "weight._format",
)
"""What lies beside a quantized weight, after its module, and changes none of its values: scales of inputs, marks."""
MARKER = "scaled_fp8"
NAMED = (
    ("proj_down", "SVDQuant, whose values only its own kernels have"),
    ("smooth_factor", "SVDQuant, whose values only its own kernels have"),
    ("wscales", "SVDQuant, whose values only its own kernels have"),
    ("qzeros", "GPTQ or AWQ"),
    ("weight_qdata", "torchao"),
    ("_weight_qdata", "torchao"),
    ("weight._shift", "optimum-quanto with 4 or 2 bits"),
    ("weight_scale_2", "NVFP4"),
)
"""What lies beside a weight -> what it is, where zimgkit does not decode that."""
FP8 = ("float8_e4m3fn", "float8_e5m2")
KNOWN_FORMATS = (*FP8, "int8_tensorwise", "int8_rowwise")
"""``format`` of ComfyUI's marks; others need more than a scale."""
NF4 = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")


UNREADABLE = (msgspec.MsgspecError, ValueError, OSError, RecursionError)


class Mark(msgspec.Struct, frozen=True):
    """ComfyUI's ``.comfy_quant`` of one weight."""

    format: str = ""
    convrot: bool = False
    convrot_groupsize: int = 256


class QuantState(msgspec.Struct, frozen=True):
    """What bitsandbytes says of one weight."""

    shape: tuple[int, ...]
    blocksize: int
    nested_blocksize: int = 0
    nested_offset: float = 0.0


def dequantized(tensors: Tensors) -> dict[str, Stored]:
    """A component's stored tensors with quantized ones decoded, and without those that say how.

    Args:
        tensors: by their stored names.

    Raises:
        CheckpointError: what lies beside a quantized weight does not fit it, or it is of a kind that is not decoded.
    """
    for name, tensor in tensors.items():
        for suffix, kind in NAMED:
            if name.endswith(f".{suffix}"):
                raise CheckpointError(
                    f"{tensor.file} is quantized as {kind} ({name!r}), which zimgkit does not decode",
                    "name a file in bf16, fp16, FP8, INT8 or NF4",
                )
    weights = {name: tensor for name, tensor in tensors.items() if not _is_unread(name, tensors)}
    decoded = {name: result for name, tensor in weights.items() if (result := _decoded(name, tensor, tensors))}
    used = {info.name for result in decoded.values() for info in result.stored}
    found: dict[str, Stored] = {}
    for name, tensor in weights.items():
        if name in decoded:
            found[decoded[name].name] = decoded[name]
        elif name not in used:
            found[name] = tensor
    return found


def _decoded(name: str, tensor: Stored, tensors: Tensors) -> Decoded | None:
    return next((result for decode in DECODERS if (result := decode(name, tensor, tensors))), None)


def _is_unread(name: str, tensors: Tensors) -> bool:
    if name.rpartition(".")[2] == MARKER:
        return True
    modules = [name.removesuffix(f".{suffix}") for suffix in UNREAD if name.endswith(f".{suffix}")]
    return any(f"{module}.{weight}" in tensors for module in modules for weight in ("weight", "weight._data"))


Decode = Callable[[str, Stored, Tensors], Decoded | None]
"""What one tensor is among others, under its stored name; None where it is nothing of a kind."""


def scaled(name: str, tensor: Stored, tensors: Tensors) -> Decoded | None:
    """FP8 and INT8 times scales, of the whole, of rows, or of blocks; those of INT8 may have been rotated."""
    is_fp8, is_int8 = tensor.dtype in FP8, tensor.dtype == "int8"
    if not (is_fp8 or is_int8) or not isinstance(tensor, TensorInfo):
        return None
    module = name.removesuffix("._data").removesuffix(".weight")
    is_weight = name.endswith((".weight", ".weight._data"))
    keys = [key for suffix in (*SCALES, "weight._scale", "SCB") if (key := f"{module}.{suffix}") in tensors]
    scale = tensors[keys[0]] if is_weight and keys else None
    # bitsandbytes has the largest values of rows.
    factor = 1 / 127 if keys[:1] == [f"{module}.SCB"] else 1.0
    mark = _mark(module, tensor, tensors)
    if mark.format not in ("", *KNOWN_FORMATS):
        raise CheckpointError(f"{tensor.file}: {name!r} is in {mark.format}, which zimgkit does not decode")
    if is_int8 and scale is None:
        return None
    if is_fp8 and scale is None:
        table = _to_bfloat16(tensor.dtype)

        def plain(start: int, stop: int) -> NDArray[np.uint16]:
            return np.asarray(table[tensor_rows(tensor, start, stop)])

        return Decoded(name, "bfloat16", tensor.shape, (tensor,), plain, tensor.dtype)
    if not isinstance(scale, TensorInfo):
        return None
    times = partial(_scales, tensor, scale, factor)
    times(0, 0)
    group = mark.convrot_groupsize if mark.convrot and is_int8 else 0
    width = row_width(tensor.shape)
    if group and (group < 4 or group & (group - 1) or group.bit_length() % 2 == 0 or width % group):
        raise CheckpointError(f"{tensor.file}: {name!r} is rotated in groups of {group}, which do not fit its width")
    wide = _to_float32(tensor.dtype) if is_fp8 else None

    def rows(start: int, stop: int) -> Array:
        stored = tensor_rows(tensor, start, stop)
        values = wide[stored] if wide is not None else stored.astype(np.float32)
        values *= times(start, stop)
        if group:
            # Its matrix is symmetric and orthonormal, so its own inverse.
            values = (values.reshape(-1, group) @ hadamard(group)).reshape(values.shape)
        return values

    encoding = f"{tensor.dtype} with scales" + (", rotated" if group else "")
    integers = None
    if is_int8 and not group and len(tensor.shape) == 2 and times(0, 1).shape[1] == 1:
        integers = Integers(8, 1, partial(tensor_rows, tensor), times)
    return Decoded(name.removesuffix("._data"), "float32", tensor.shape, (tensor, scale), rows, encoding, integers)


def four_bits(name: str, tensor: Stored, tensors: Tensors) -> Decoded | None:
    """Bitsandbytes' NF4 and FP4: two values a byte, the first in the high bits; blocks of them have a scale."""
    state_key = next((name + suffix for suffix in NF4 if name + suffix in tensors), None)
    if state_key is None or not isinstance(tensor, TensorInfo):
        return None
    said = f"{tensor.file}: {name!r}"

    def need(suffix: str, dtype: str = "") -> TensorInfo:
        found = tensors.get(name + suffix)
        if not isinstance(found, TensorInfo) or (dtype and found.dtype != dtype):
            raise CheckpointError(f"{said} is in 4 bits of bitsandbytes, without a readable {suffix.lstrip('.')!r}")
        return found

    state_info = need(state_key.removeprefix(name), "uint8")
    try:
        state = msgspec.json.decode(_text(state_info), type=QuantState)
    except UNREADABLE as error:
        raise CheckpointError(f"{said} has no readable {state_key!r} ({error})") from None
    absmax, table_info = need(".absmax"), need(".quant_map", "float32")
    nested = absmax.dtype == "uint8"
    stored: tuple[TensorInfo, ...] = (tensor, absmax, table_info)
    if nested:
        stored += (need(".nested_absmax", "float32"), need(".nested_quant_map", "float32"))
    count = math.prod(state.shape)
    blocks = math.ceil(count / state.blocksize) if state.blocksize > 0 else -1
    fits = tensor.dtype == "uint8" and 2 * tensor.nbytes in (count, count + 1) and math.prod(absmax.shape) == blocks
    fits = fits and table_info.shape == (16,) and all(size >= 0 for size in state.shape) and len(state.shape) > 0
    if nested and fits:
        fits = (
            state.nested_blocksize > 0
            and math.prod(stored[3].shape) == math.ceil(blocks / state.nested_blocksize)
            and stored[4].shape == (256,)
        )
    if not fits:
        raise CheckpointError(f"{said} and what lies beside it do not fit the shape {state.shape} of its quant_state")
    width, size = row_width(state.shape), state.blocksize

    def factors(first: int, last: int) -> Array:
        values = read_elements(absmax, first, last)
        if not nested:
            return to_float32(values, absmax.dtype)
        own, table = (read_elements(info, 0, math.prod(info.shape)) for info in stored[3:])
        return np.asarray(
            table[values] * own[np.arange(first, last) // state.nested_blocksize] + np.float32(state.nested_offset),
            np.float32,
        )

    def rows(start: int, stop: int) -> Array:
        begin, end = start * width, stop * width
        packed = read_elements(tensor, begin // 2, (end + 1) // 2)
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[begin % 2 :][: end - begin]
        table = read_elements(table_info, 0, 16)
        first = begin // size
        each = np.repeat(factors(first, max(first, -(-end // size))), size)[begin - first * size :][: end - begin]
        return np.asarray(table[codes] * each, np.float32).reshape(stop - start, width)

    return Decoded(name, "float32", state.shape, (*stored, state_info), rows, "4 bits of bitsandbytes")


DECODERS: tuple[Decode, ...] = (four_bits, scaled)


@cache
def hadamard(size: int) -> Array:
    """The regular Hadamard matrix of a power of 4, orthonormal and symmetric, (size, size)."""
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32)
    matrix = four
    while len(matrix) < size:
        matrix = np.kron(matrix, four)
    return np.asarray(matrix / np.float32(math.sqrt(size)), np.float32)


def _scales(tensor: TensorInfo, scale: TensorInfo, factor: float, start: int, stop: int) -> Array:
    """The scales of some rows, as they multiply these."""
    rows, width = row_count(tensor.shape), row_width(tensor.shape)
    count = math.prod(scale.shape)
    values = to_float32(read_elements(scale, 0, count), scale.dtype) if scale.dtype not in FP8 else None
    down, across = (count, 1) if count in (1, rows) else (scale.shape if len(scale.shape) == 2 else (0, 0))
    if values is None or not down or not across or rows % down or width % across:
        raise CheckpointError(
            f"{tensor.file}: the scales {scale.name!r}, {scale.shape}, do not fit {tensor.name!r}, {tensor.shape}"
        )
    values = values.reshape(down, across) * np.float32(factor)
    return np.repeat(values[np.arange(start, stop) // (rows // down)], width // across if across > 1 else 1, axis=1)


def _mark(module: str, tensor: TensorInfo, tensors: Tensors) -> Mark:
    """What ComfyUI says of a weight: beside it, or in the file's metadata."""
    own = tensors.get(f"{module}.comfy_quant")
    try:
        if isinstance(own, TensorInfo):
            return msgspec.json.decode(_text(own), type=Mark)
        layers = _metadata(tensor.file, tensor.file.stat().st_mtime_ns)
        short = next((name for name in layers if module == name or module.endswith(f".{name}")), None)
        return msgspec.convert(layers[short], Mark) if short is not None else Mark()
    except UNREADABLE as error:
        raise CheckpointError(f"{tensor.file}: the mark of {module!r} cannot be read ({error})") from None


def _text(info: TensorInfo) -> bytes:
    """A tensor of bytes that hold JSON; none is long."""
    return read_elements(info, 0, min(math.prod(info.shape), 1 << 16)).tobytes()


@cache
def _metadata(file: Path, modified: int) -> dict[str, Any]:
    """``layers`` of the metadata that some tools write in the place of marks."""
    said = json.loads(read_metadata(file).get("_quantization_metadata", "{}"))
    layers = said.get("layers") if isinstance(said, dict) else None
    return layers if isinstance(layers, dict) else {}


def _to_float32(dtype: str) -> Array:
    """The values of all patterns of a float8 type."""
    bits = np.arange(256, dtype=np.uint8)
    mantissa_bits, bias = (3, 7) if dtype == "float8_e4m3fn" else (2, 15)
    exponent = (bits & 0x7F) >> mantissa_bits
    mantissa = (bits & ((1 << mantissa_bits) - 1)).astype(np.float32) / (1 << mantissa_bits)
    values = np.ldexp(np.where(exponent, 1 + mantissa, mantissa), np.maximum(exponent, 1).astype(int) - bias)
    last = (bits & 0x7F) == 0x7F if mantissa_bits == 3 else exponent == 31
    values = np.where(last, np.where((mantissa == 0) & (mantissa_bits == 2), np.inf, np.nan), values)
    return np.asarray(np.where(bits & 0x80, -values, values), np.float32)


def _to_bfloat16(dtype: str) -> NDArray[np.uint16]:
    """Likewise, as bits of bfloat16, which has them all."""
    return np.asarray(_to_float32(dtype).view(np.uint32) >> 16, np.uint16)
