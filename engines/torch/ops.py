"""What each ONNX operator means in torch: one table, from operator type to a function of tensors.

Inputs come in ONNX order, ``None`` where an optional one is left out; attributes come as keywords. The semantics
are those of opset 23 (https://onnx.ai/onnx/operators), as far as the exporter writes them: ``ONLY`` lists the
attribute values beyond which an operator is not covered. Shapes, axes and other small integers (``HOST_INPUTS``) come
on the CPU whatever the device, so that reading them never waits for the device; or as numbers, once they are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zimgkit.engines.tensors.dtypes import BY_ONNX
from zimgkit.engines.torch import layers
from zimgkit.engines.torch.layers import Numbers, read

HOST_INPUTS = {
    "CumSum": {1},
    "Expand": {1},
    "Pad": {1, 2, 3},
    "ReduceL2": {1},
    "ReduceMax": {1},
    "ReduceMean": {1},
    "ReduceMin": {1},
    "ReduceSum": {1},
    "ReduceSumSquare": {1},
    "Reshape": {1},
    "Resize": {2, 3},
    "Slice": {1, 2, 3, 4},
    "Split": {1},
    "Squeeze": {1},
    "Tile": {1},
    "Trilu": {1},
    "Unsqueeze": {1},
}
"""Operator type -> the inputs that are read on the host: positions in the list of inputs."""

ONLY: dict[str, dict[str, set[Any]]] = {
    "Attention": {"qk_matmul_output_mode": {0}, "softcap": {0.0}, "softmax_precision": {1, 10, 16}},
    "Conv": {"auto_pad": {"NOTSET", "VALID"}, "kernel_shape": set()},
    "CumSum": {"exclusive": {0}, "reverse": {0}},
    "GatherND": {"batch_dims": {0}},
    "GroupNormalization": {"stash_type": {1}},
    "LayerNormalization": {"stash_type": {1}},
    "Pad": {"mode": {"constant"}},
    "QuantizeLinear": {"precision": {0}, "saturate": {1}},
    "RMSNormalization": {"stash_type": {1}},
    "Resize": {
        "antialias": {0},
        "coordinate_transformation_mode": {"asymmetric"},
        "cubic_coeff_a": set(),
        "exclude_outside": set(),
        "extrapolation_value": set(),
        "keep_aspect_ratio_policy": {"stretch"},
        "mode": {"nearest"},
        "nearest_mode": {"floor"},
    },
    **{f"Reduce{kind}": {"noop_with_empty_axes": {0}} for kind in ("L2", "Max", "Mean", "Min", "Sum", "SumSquare")},
}
"""Operator type -> attributes that the functions below do not take, and the values they may have; empty: any."""


def torch_dtype(onnx_type: int) -> torch.dtype:
    """The torch type of an ``onnx.TensorProto.DataType``.

    Raises:
        KeyError: zimgkit has no such type.
    """
    dtype: torch.dtype = getattr(torch, BY_ONNX[onnx_type].name)
    return dtype


# Arithmetic


def _div(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _pow(base: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(base, exponent).to(base.dtype)


def _max(*tensors: Tensor) -> Tensor:
    return reduce(torch.maximum, tensors)


def _min(*tensors: Tensor) -> Tensor:
    return reduce(torch.minimum, tensors)


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


def _cumsum(x: Tensor, axis: Numbers) -> Tensor:
    return torch.cumsum(x, read(axis), dtype=x.dtype)


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, axes: Numbers | None = None, *, keepdims: int = 1) -> Tensor:
        dims = read(axes) if axes is not None else []
        return function(x, dims or list(range(x.ndim)), bool(keepdims))

    return run


# Element types and quantization


def _cast(x: Tensor, *, to: int, saturate: int = 1) -> Tensor:
    return _convert(x, torch_dtype(to), saturate)


def _cast_like(x: Tensor, target: Tensor, *, saturate: int = 1) -> Tensor:
    return _convert(x, target.dtype, saturate)


def _convert(x: Tensor, dtype: torch.dtype, saturate: int = 1) -> Tensor:
    # To float8, torch turns what is too large into NaN and ONNX into the largest value.
    if saturate and dtype.is_floating_point and dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        x = x.clamp(-largest, largest)
    return x.to(dtype)


def _spread(scale: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """Shape a scale or zero point per tensor, per channel or per block so that it broadcasts over ``x``."""
    if block_size:
        return scale.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    return scale.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]) if scale.ndim else scale


def _quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    dtype = torch.uint8
    if zero_point is not None:
        dtype = zero_point.dtype
    elif output_dtype:
        dtype = torch_dtype(output_dtype)
    y = x.to(scale.dtype) / _spread(scale, x, axis, block_size)
    if dtype.is_floating_point:
        return _convert(y, dtype)
    y = y.round()
    if zero_point is not None:
        y = y + _spread(zero_point, x, axis, block_size)
    limits = torch.iinfo(dtype)
    return y.clamp(limits.min, limits.max).to(dtype)


def _dequantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    dtype = torch_dtype(output_dtype) if output_dtype else scale.dtype
    # Eight bits fit every float type exactly; the 32 of a bias do not.
    y = x.to(dtype if x.dtype.itemsize == 1 else torch.float32)
    if zero_point is not None:
        y = y - _spread(zero_point, x, axis, block_size).to(y.dtype)
    return (y * _spread(scale, x, axis, block_size)).to(dtype)


# Shapes


def _shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def _size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


def _reshape(x: Tensor, shape: Numbers, *, allowzero: int = 0) -> Tensor:
    sizes = read(shape)
    if not allowzero and 0 in sizes:
        sizes = [size or x.shape[i] for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _expand(x: Tensor, shape: Numbers) -> Tensor:
    sizes = read(shape)
    sizes = [1] * (x.ndim - len(sizes)) + sizes
    new = len(sizes) - x.ndim
    return x.expand(sizes[:new] + [old if size == 1 else size for old, size in zip(x.shape, sizes[new:], strict=True)])


def _transpose(x: Tensor, perm: Sequence[int] | None = None) -> Tensor:
    return torch.permute(x, tuple(perm) if perm is not None else tuple(range(x.ndim))[::-1])


def _unsqueeze(x: Tensor, axes: Numbers) -> Tensor:
    dims = read(axes)
    rank = x.ndim + len(dims)
    for dim in sorted(dim % rank for dim in dims):
        x = x.unsqueeze(dim)
    return x


def _squeeze(x: Tensor, axes: Numbers | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(read(axes))


def _concat(*tensors: Tensor, axis: int) -> Tensor:
    return torch.cat(tensors, axis)


def _split(x: Tensor, split: Numbers | None = None, *, axis: int = 0, num_outputs: int = 1) -> tuple[Tensor, ...]:
    return torch.split(x, -(-x.shape[axis] // num_outputs) if split is None else read(split), axis)


def _slice(
    x: Tensor, starts: Numbers, ends: Numbers, axes: Numbers | None = None, steps: Numbers | None = None
) -> Tensor:
    begins, stops = read(starts), read(ends)
    dims = read(axes) if axes is not None else list(range(len(begins)))
    strides = read(steps) if steps is not None else [1] * len(begins)
    for dim, begin, stop, stride in zip(dims, begins, stops, strides, strict=True):
        if stride > 0:
            x = x[(slice(None),) * (dim % x.ndim) + (slice(begin, stop, stride),)]
        else:
            picked = range(*slice(begin, stop, stride).indices(x.shape[dim]))
            x = x.index_select(dim, picked.start + stride * torch.arange(len(picked), device=x.device))
    return x


def _gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    picked: Tensor = x[(slice(None),) * (axis % x.ndim) + (indices,)]
    return picked


def _gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices))


def _gather_nd(x: Tensor, indices: Tensor) -> Tensor:
    picked: Tensor = x[indices.unbind(-1)]
    return picked


def _tile(x: Tensor, repeats: Numbers) -> Tensor:
    return x.repeat(read(repeats))


def _pad(x: Tensor, pads: Numbers, value: Numbers | None = None, axes: Numbers | None = None) -> Tensor:
    amounts = read(pads)
    dims = read(axes) if axes is not None else list(range(x.ndim))
    by_dim = {dim % x.ndim: amounts[i :: len(dims)] for i, dim in enumerate(dims)}
    # ONNX lists all beginnings, then all ends; torch lists pairs, from the last dimension on.
    pairs = [amount for dim in reversed(range(x.ndim)) for amount in by_dim.get(dim, (0, 0))]
    return F.pad(x, pairs, value=0 if value is None else read(value))


def _identity(x: Tensor) -> Tensor:
    return x


def _trilu(x: Tensor, k: Numbers | None = None, *, upper: int = 1) -> Tensor:
    return (torch.triu if upper else torch.tril)(x, 0 if k is None else read(k))


OPS: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "Attention": layers.attention,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": torch.ceil,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": layers.conv,
    "Cos": torch.cos,
    "CumSum": _cumsum,
    "DequantizeLinear": _dequantize,
    "Div": _div,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Expand": _expand,
    "Floor": torch.floor,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gelu": layers.gelu,
    "Gemm": layers.gemm,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "GroupNormalization": layers.group_norm,
    "Identity": _identity,
    "InstanceNormalization": layers.instance_norm,
    "LayerNormalization": layers.layer_norm,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "MatMul": layers.matmul,
    "Max": _max,
    "Min": _min,
    "Mod": _mod,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Pad": _pad,
    "Pow": _pow,
    "QuantizeLinear": _quantize,
    "RMSNormalization": layers.rms_norm,
    "Range": _range,
    "Reciprocal": torch.reciprocal,
    "ReduceL2": _reduction(lambda x, dims, keep: torch.linalg.vector_norm(x, 2, dims, keep)),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMean": _reduction(torch.mean),
    "ReduceMin": _reduction(torch.amin),
    "ReduceSum": _reduction(lambda x, dims, keep: torch.sum(x, dims, keep, dtype=x.dtype)),
    "ReduceSumSquare": _reduction(lambda x, dims, keep: torch.sum(x * x, dims, keep, dtype=x.dtype)),
    "Relu": torch.relu,
    "Reshape": _reshape,
    "Resize": layers.resize,
    "RotaryEmbedding": layers.rotary_embedding,
    "Round": torch.round,
    "Shape": _shape,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Size": _size,
    "Slice": _slice,
    "Softmax": layers.softmax,
    "Split": _split,
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": torch.where,
}
"""Operator type -> what it does; ``Constant`` and ``ConstantOfShape`` are no steps and not here."""
