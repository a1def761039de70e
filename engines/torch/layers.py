"""The ONNX operators that are layers of a network, in torch: products, convolutions, norms, attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zimgkit.engines.cpu import multiplies_bfloat16

PRODUCTS_IN_BFLOAT16 = multiplies_bfloat16()
"""Whether this CPU has units that multiply bfloat16. Read once: what is traced asks for it in every product."""


def _summed_in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """On a CPU without units that multiply bfloat16, it is computed in float32 and rounded once, as these do.

    There torch takes a hundred times as long for a product in bfloat16, and more for a convolution.
    """

    @wraps(function)
    def run(x: Tensor, *others: Tensor | None, **attributes: Any) -> Tensor:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or PRODUCTS_IN_BFLOAT16:
            return function(x, *others, **attributes)
        wide = [other if other is None else other.float() for other in others]
        return function(x.float(), *wide, **attributes).to(x.dtype)

    return run


@_summed_in_float32
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """(..., n, k) and (..., k, m) -> (..., n, m); a dimension that one of them lacks is broadcast."""
    return torch.matmul(a, b)


@_summed_in_float32
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 (ONNX's own names)
    transB: int = 0,  # noqa: N803
) -> Tensor:
    """``alpha a b + beta c`` of matrices, either of which may come transposed."""
    a, b = (a.t() if transA else a), (b.t() if transB else b)
    return torch.mm(a, b) * alpha if c is None else torch.addmm(c, a, b, alpha=alpha, beta=beta)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """``approximate`` is ``"none"`` or ``"tanh"``."""
    return F.gelu(x, approximate=approximate)


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Over one axis."""
    return torch.softmax(x, axis)


@_summed_in_float32
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: int = 1,
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
    dilations: Sequence[int] = (),
) -> Tensor:
    """(batch, channels, spatial...) by (channels out, channels / group, spatial...), ``pads`` as ONNX orders them."""
    rank = x.ndim - 2
    before, after = tuple(pads[:rank]) or (0,) * rank, tuple(pads[rank:]) or (0,) * rank
    if before != after:
        pairs = [amount for pair in reversed(list(zip(before, after, strict=True))) for amount in pair]
        x, before = F.pad(x, pairs), (0,) * rank
    ones = (1,) * rank
    return torch.convolution(x, weight, bias, strides or ones, before, dilations or ones, False, (0,) * rank, group)


Numbers = Tensor | Sequence[float]
"""What is read on the host: a tensor there, or what it holds."""


def read(numbers: Any) -> Any:
    """The numbers of a tensor on the host, or of what they were read into before."""
    return numbers.tolist() if isinstance(numbers, Tensor) else numbers


def resize(x: Tensor, _roi: Tensor | None, scales: Numbers | None, sizes: Numbers | None = None) -> Tensor:
    """Nearest neighbours, by factors of all dimensions or to given sizes."""
    if sizes is not None:
        return F.interpolate(x, size=read(sizes)[2:], mode="nearest")
    if scales is None:
        raise ValueError("Resize has neither scales nor sizes")
    return F.interpolate(x, scale_factor=read(scales)[2:], mode="nearest")


def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Each channel of each picture by itself."""
    return F.group_norm(x, x.shape[1], scale, bias, epsilon)


def group_norm(x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5) -> Tensor:
    """Each group of channels of each picture by itself."""
    return F.group_norm(x, num_groups, scale, bias, epsilon)


def layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5
) -> Tensor:
    """Over the dimensions from ``axis`` on."""
    shape = x.shape[axis % x.ndim :]
    bias = bias if bias is None else bias.expand(shape)
    return F.layer_norm(x, shape, scale.expand(shape), bias, epsilon)


def rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5) -> Tensor:
    """Over the dimensions from ``axis`` on; scaled in the type of ``scale``."""
    shape = x.shape[axis % x.ndim :]
    if x.dtype == scale.dtype:
        return F.rms_norm(x, shape, scale.expand(shape), epsilon)
    return F.rms_norm(x, shape, None, epsilon).to(scale.dtype) * scale


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Turn the pairs of each head by their position's angles.

    Args:
        x: (batch, heads, sequence, head width), or (batch, sequence, heads x head width) with ``num_heads``.
        cos: (batch, sequence, pairs), or (positions, pairs) with ``position_ids`` (batch, sequence).
        sin: as ``cos``.
        position_ids: rows of the tables.
        interleaved: whether pairs are neighbours, or lie half a head apart.
        num_heads: heads of a 3-D ``x``.
        rotary_embedding_dim: leading values of a head that are turned; 0: all.
    """
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    heads = x if x.ndim == 4 else x.reshape(*x.shape[:2], num_heads, -1)
    # A 4-D x has its heads before the sequence, a 3-D one after it.
    axis = 1 if x.ndim == 4 else 2
    cos, sin = cos.unsqueeze(axis), sin.unsqueeze(axis)
    width = rotary_embedding_dim or heads.shape[-1]
    turned = heads[..., :width]
    if interleaved and torch.compiler.is_compiling():
        first, second = turned.float().reshape(*turned.shape[:-1], -1, 2).unbind(-1)
        y = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2).to(x.dtype)
    elif interleaved:
        # One complex product: many times as fast as strided slices, and float32 also where the rest is not.
        pairs = torch.view_as_complex(turned.float().reshape(*turned.shape[:-1], -1, 2).contiguous())
        y = torch.view_as_real(pairs * torch.complex(cos.float(), sin.float())).flatten(-2).to(x.dtype)
    else:
        first, second = turned.chunk(2, -1)
        real = torch.addcmul(first * cos, second, sin, value=-1)
        y = torch.cat((real, torch.addcmul(first * sin, second, cos)), -1)
    if width < heads.shape[-1]:
        y = torch.cat((y, heads[..., width:]), -1)
    return y if x.ndim == 4 else y.flatten(2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: int = 0,
    scale: float | None = None,
    q_num_heads: int = 0,
    kv_num_heads: int = 0,
) -> Tensor:
    """Scaled dot-product attention with grouped heads.

    Args:
        q: (batch, heads, sequence, head width), or (batch, sequence, heads x head width) with ``q_num_heads``.
        k: as ``q``, with ``kv_num_heads``, which divide the query's.
        v: as ``k``.
        mask: true where a key takes part, or a bias; broadcastable to (batch, heads, queries, keys).
        is_causal: whether query i sees the keys up to i alone.
        scale: of the products; 1 / sqrt(head width) when not given.
        q_num_heads: heads of 3-D inputs.
        kv_num_heads: heads of 3-D inputs.
    """
    flat = q.ndim == 3
    if flat:
        q = q.reshape(*q.shape[:2], q_num_heads, -1).transpose(1, 2)
        k = k.reshape(*k.shape[:2], kv_num_heads, -1).transpose(1, 2)
        v = v.reshape(*v.shape[:2], kv_num_heads, -1).transpose(1, 2)
    # Of what is strided otherwise PyTorch keeps all scores, and of CPUs no other kernel takes it.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if mask is not None and is_causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))
        is_causal = 0
    y = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=bool(is_causal), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2).flatten(2) if flat else y
