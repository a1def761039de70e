"""The kernel, for the build alone: a program normalizes and turns a few heads of one token."""

import triton
import triton.language as tl

from zimgkit.plugins.compile import Kernel


@triton.jit
def _normed_and_turned(values, scale, cosines, sines, width, epsilon, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Heads (HEADS, WIDTH) of one token, float32, of which the first columns are some; zeros after them."""
    mean_square = tl.sum(values * values, axis=1) / width
    values = values * tl.rsqrt(mean_square + epsilon)[:, None] * scale[None, :]
    even, odd = tl.split(tl.reshape(values, (HEADS, WIDTH // 2, 2)))
    turned = tl.join(even * cosines - odd * sines, odd * cosines + even * sines)
    return tl.reshape(turned, (HEADS, WIDTH))


@triton.jit
def qk_norm_rope(
    x,
    weight,
    cos,
    sin,
    y,
    tokens,
    batch,
    heads,
    width,
    x_batch,
    x_token,
    table_batch,
    table_token,
    y_batch,
    y_token,
    epsilon,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(tokens, batch, heads / HEADS) programs; strides are counted in elements, heads and columns lie side by side."""
    token, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, column, pair = tl.program_id(2) * HEADS + tl.arange(0, HEADS), tl.arange(0, WIDTH), tl.arange(0, WIDTH // 2)
    inside = (head < heads)[:, None] & (column < width)[None, :]
    place = head[:, None] * width + column[None, :]
    values = tl.load(x + picture * x_batch + token * x_token + place, mask=inside, other=0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < width, other=0).to(tl.float32)
    table = picture * table_batch + token * table_token + pair
    cosines = tl.load(cos + table, mask=pair < width // 2, other=0)[None, :]
    sines = tl.load(sin + table, mask=pair < width // 2, other=0)[None, :]
    turned = _normed_and_turned(values, scale, cosines, sines, width, epsilon, HEADS, WIDTH)
    tl.store(y + picture * y_batch + token * y_token + place, turned.to(y.dtype.element_ty), mask=inside)


@triton.jit
def dense_qk_norm_rope(
    x,
    weight,
    cos,
    sin,
    tokens,
    batch,
    heads,
    width,
    epsilon_bits,
    y,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The same where all tensors lie densely, in the order of TensorRT, which gives integers beside them alone."""
    joint_dense_qk_norm_rope(
        x, weight, x, weight, cos, sin, 0, tokens, batch, heads, width, epsilon_bits, y, HEADS, WIDTH
    )


@triton.jit
def joint_dense_qk_norm_rope(
    context,
    context_weight,
    x,
    weight,
    cos,
    sin,
    context_tokens,
    tokens,
    batch,
    heads,
    width,
    epsilon_bits,
    y,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Likewise; ``tokens`` are all of them, those of the context first."""
    token, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, column, pair = tl.program_id(2) * HEADS + tl.arange(0, HEADS), tl.arange(0, WIDTH), tl.arange(0, WIDTH // 2)
    place = head[:, None] * width + column[None, :]
    context_width = tl.where(token < context_tokens, width, 0)
    in_context, in_own = column < context_width, column < width - context_width
    in_heads = (head < heads)[:, None]
    of_context = (picture * context_tokens + token) * heads * width + place
    own = (picture * (tokens - context_tokens) + token - context_tokens) * heads * width + place
    values = tl.load(context + of_context, mask=in_heads & in_context[None, :], other=0).to(tl.float32)
    values += tl.load(x + own, mask=in_heads & in_own[None, :], other=0).to(tl.float32)
    scale = tl.load(context_weight + column, mask=in_context, other=0).to(tl.float32)
    scale += tl.load(weight + column, mask=in_own, other=0).to(tl.float32)
    table = (picture * tokens + token) * (width // 2) + pair
    cosines = tl.load(cos + table, mask=pair < width // 2, other=0)[None, :]
    sines = tl.load(sin + table, mask=pair < width // 2, other=0)[None, :]
    epsilon = epsilon_bits.to(tl.float32, bitcast=True)
    turned = _normed_and_turned(values, scale, cosines, sines, width, epsilon, HEADS, WIDTH)
    placed = ((picture * heads + head[:, None]) * tokens + token) * width + column[None, :]
    tl.store(y + placed, turned.to(y.dtype.element_ty), mask=in_heads & (column < width)[None, :])


_SIZES = {"HEADS": 8, "WIDTH": 128}
_GRID = (("tokens", 1), ("batch", 1), ("heads", 8))
KERNELS = (
    Kernel(
        qk_norm_rope,
        grid=_GRID,
        constants=_SIZES,
        floats="x weight y",
        singles="cos sin",
        multiples="width x_batch x_token y_batch y_token",
        reals="epsilon",
        limits={"width": 128},
    ),
    Kernel(
        dense_qk_norm_rope,
        grid=_GRID,
        constants=_SIZES,
        floats="x weight y",
        singles="cos sin",
        multiples="width",
        limits={"width": 128},
        is_portable=True,
    ),
    Kernel(
        joint_dense_qk_norm_rope,
        grid=_GRID,
        constants=_SIZES,
        floats="context context_weight x weight y",
        singles="cos sin",
        multiples="width",
        limits={"width": 128},
        is_portable=True,
    ),
)
