"""The kernel, for the build alone: a program normalizes and turns a few heads of one token."""

import triton
import triton.language as tl

from zimgkit.plugins.compile import Kernel


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
    mean_square = tl.sum(values * values, axis=1) / width
    scale = tl.load(weight + column, mask=column < width, other=0).to(tl.float32)
    values = values * tl.rsqrt(mean_square + epsilon)[:, None] * scale[None, :]
    table = picture * table_batch + token * table_token + pair
    cosines = tl.load(cos + table, mask=pair < width // 2, other=0)[None, :]
    sines = tl.load(sin + table, mask=pair < width // 2, other=0)[None, :]
    even, odd = tl.split(tl.reshape(values, (HEADS, WIDTH // 2, 2)))
    turned = tl.join(even * cosines - odd * sines, odd * cosines + even * sines)
    turned = tl.reshape(turned, (HEADS, WIDTH))
    tl.store(y + picture * y_batch + token * y_token + place, turned.to(y.dtype.element_ty), mask=inside)


KERNELS = (
    Kernel(
        qk_norm_rope,
        grid=(("tokens", 1), ("batch", 1), ("heads", 8)),
        constants={"HEADS": 8, "WIDTH": 128},
        floats="x weight y",
        singles="cos sin",
        multiples="width x_batch x_token y_batch y_token",
        reals="epsilon",
        limits={"width": 128},
    ),
)
