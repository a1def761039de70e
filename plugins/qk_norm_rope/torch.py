"""The operator in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from zimgkit.plugins.pytorch import dtype_name, queue


@library.custom_op("zimg::qk_norm_rope", mutates_args=())
def qk_norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, epsilon: float) -> Tensor:
    """Normalize and rotate; see :mod:`zimgkit.plugins.qk_norm_rope.definition`."""
    y = launched([(x, weight)], cos, sin, epsilon)
    return composed([(x, weight)], cos, sin, epsilon) if y is None else y


@library.custom_op("zimg::joint_qk_norm_rope", mutates_args=())
def joint_qk_norm_rope(
    context: Tensor, context_weight: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, epsilon: float
) -> Tensor:
    """The same of a context's tokens, which are normalized by other weights, and then those of ``x``."""
    streams = [(context, context_weight), (x, weight)]
    y = launched(streams, cos, sin, epsilon)
    return composed(streams, cos, sin, epsilon) if y is None else y


@qk_norm_rope.register_fake
def _(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, epsilon: float) -> Tensor:
    return _empty(x, x.shape[1])


@joint_qk_norm_rope.register_fake
def _(
    context: Tensor, context_weight: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, epsilon: float
) -> Tensor:
    return _empty(x, context.shape[1] + x.shape[1])


CALLS: dict[str, Callable[..., Any]] = {
    "QKNormRope": torch.ops.zimg.qk_norm_rope.default,
    "JointQKNormRope": torch.ops.zimg.joint_qk_norm_rope.default,
}
"""Function -> what computes it."""
SIZES = ((33, 30, 128), (64, 24, 128), (5, 3, 16))

Streams = list[tuple[Tensor, Tensor]]
"""Tokens (batch, tokens, heads, width) and the weight of their norm (width,), one after the other."""


def launched(streams: Streams, cos: Tensor, sin: Tensor, epsilon: float) -> Tensor | None:
    """By the kernel, where there is one."""
    x, first = streams[-1][0], 0
    y = _empty(x, sum(tokens.shape[1] for tokens, _ in streams))
    if cos.dtype != torch.float32 or cos.stride() != sin.stride() or cos.stride(-1) != 1:
        return None
    if not cos.shape == sin.shape == (len(y), y.shape[2], y.shape[3] // 2):
        return None
    for tokens, weight in streams:
        batch, count, heads, width = tokens.shape
        if not tokens.dtype == weight.dtype == x.dtype or tokens.stride()[2:] != (width, 1):
            return None
        if weight.shape != (width,) or not weight.is_contiguous() or tokens.shape[2:] != x.shape[2:]:
            return None
        if not queue(
            "qk_norm_rope",
            f"qk_norm_rope.{dtype_name(x.dtype)}",
            x.device,
            x=tokens,
            weight=weight,
            cos=cos[:, first:],
            sin=sin[:, first:],
            y=y[:, :, first:],
            tokens=count,
            batch=batch,
            heads=heads,
            width=width,
            x_batch=tokens.stride(0),
            x_token=tokens.stride(1),
            table_batch=cos.stride(0),
            table_token=cos.stride(1),
            y_batch=y.stride(0),
            y_token=y.stride(2),
            epsilon=epsilon,
        ):
            return None
        first += count
    return y


def composed(streams: Streams, cos: Tensor, sin: Tensor, epsilon: float) -> Tensor:
    """By PyTorch's own calls."""
    normed = torch.cat([_normed(x, weight, epsilon) for x, weight in streams], dim=1)
    pairs = torch.view_as_complex(normed.reshape(*normed.shape[:-1], -1, 2))
    turned = torch.view_as_real(pairs * torch.complex(cos, sin).unsqueeze(2)).flatten(-2)
    return turned.to(streams[-1][0].dtype).transpose(1, 2)


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], weight.float().expand(x.shape[-1:]), epsilon)


def trials(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[tuple[int, int, int]] = SIZES
) -> Iterator[tuple[Tensor | None, Tensor]]:
    """What the kernel gives, and what PyTorch's own calls give, for some tokens, heads and widths."""
    maker = torch.Generator(device).manual_seed(0)

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=maker, device=device, dtype=kind)

    for tokens, heads, width in sizes:
        streams = [(random(2, count, heads, width), random(width)) for count in (tokens, 7)]
        angles = random(1, tokens + 7, width // 2, kind=torch.float32).expand(2, -1, -1)
        arguments = (streams, angles.cos(), angles.sin(), 1e-5)
        yield launched(*arguments), composed(*arguments)


def _empty(x: Tensor, tokens: int) -> Tensor:
    """(batch, heads, tokens, width), with the heads of a token side by side."""
    return x.new_empty((x.shape[0], tokens, *x.shape[2:])).transpose(1, 2)
