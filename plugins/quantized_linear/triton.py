"""The kernels, for the build alone: products with weights of 8 and 4 bits, and the rounding of a product's input."""

import triton
import triton.language as tl

from zimgkit.plugins.compile import Kernel


@triton.jit
def round_rows(x, smooth, step, rounded, steps, rows, width, x_row, has_smooth, has_step, bits, WIDTH: tl.constexpr):
    """(rows,) programs: a row to int8 (``bits`` 1) or float8 (2), by one step for all, or by one of its own."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    largest = tl.where(bits == 1, 127.0, 448.0)
    scale = 1.0
    if has_step:
        scale = tl.load(step).to(tl.float32)
    else:
        size = tl.zeros((WIDTH,), tl.float32)
        for start in range(0, width, WIDTH):
            inside = start + column < width
            values = tl.load(x + row * x_row + start + column, mask=inside, other=0).to(tl.float32)
            if has_smooth:
                values *= tl.load(smooth + start + column, mask=inside, other=0).to(tl.float32)
            size = tl.maximum(size, tl.abs(values))
        # A row of zeros stays one.
        scale = tl.maximum(tl.max(size, axis=0) / largest, 1e-30)
        tl.store(steps + row, scale)
    for start in range(0, width, WIDTH):
        inside = start + column < width
        values = tl.load(x + row * x_row + start + column, mask=inside, other=0).to(tl.float32)
        if has_smooth:
            values *= tl.load(smooth + start + column, mask=inside, other=0).to(tl.float32)
        values /= scale
        place = rounded + row * width + start + column
        if bits == 1:
            # Adding and taking away 1.5 * 2 ** 23 rounds to whole numbers, halves to even.
            whole = tl.minimum(tl.maximum(values, -128), 127) + 12582912 - 12582912
            tl.store(place, whole.to(tl.int8), mask=inside)
        else:
            small = tl.minimum(tl.maximum(values, -448), 448).to(tl.float8e4nv)
            tl.store(place, small.to(tl.int8, bitcast=True), mask=inside)


@triton.jit
def rounded_product(
    x,
    step,
    steps,
    weight,
    scale,
    bias,
    y,
    rows,
    width,
    out,
    has_steps,
    has_bias,
    FLOAT8: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(out / OUT, rows / ROWS) programs: both operands of 8 bits, the scales applied to what comes out."""
    # Programs of some rows are neighbours, so that what they read is still in the cache.
    i, j = tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), 8)
    row, column, depth = i * ROWS + tl.arange(0, ROWS), j * OUT + tl.arange(0, OUT), tl.arange(0, WIDTH)
    left = x + (row % rows).to(tl.int64)[:, None] * width + depth[None, :]
    right = weight + (column % out).to(tl.int64)[None, :] * width + depth[:, None]
    sums = tl.zeros((ROWS, OUT), tl.float32 if FLOAT8 else tl.int32)
    for start in range(0, width, WIDTH):
        inside = start + depth < width
        a = tl.load(left + start, mask=inside[None, :], other=0)
        b = tl.load(right + start, mask=inside[:, None], other=0)
        if FLOAT8:
            a, b = a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True)
        sums = tl.dot(a, b, sums)
    values = sums.to(tl.float32) * tl.load(scale + column % out).to(tl.float32)[None, :]
    if has_steps:
        values *= tl.load(steps + row % rows)[:, None]
    else:
        values *= tl.load(step).to(tl.float32)
    if has_bias:
        values += tl.load(bias + column % out).to(tl.float32)[None, :]
    place = y + row.to(tl.int64)[:, None] * out + column[None, :]
    tl.store(place, values.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (column < out)[None, :])


@triton.jit
def widened_product(
    x,
    weight,
    scale,
    bias,
    y,
    rows,
    width,
    out,
    x_row,
    block,
    has_bias,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(out / OUT, rows / ROWS) programs: weights of 8 or 4 bits are widened a tile at a time.

    There is a scale for each ``block`` values of a weight's row, a multiple of WIDTH; two values of 4 bits share a
    byte, the first in the low half.
    """
    i, j = tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), 8)
    row, column, depth = i * ROWS + tl.arange(0, ROWS), j * OUT + tl.arange(0, OUT), tl.arange(0, WIDTH)
    stored = tl.arange(0, WIDTH * BITS // 8)
    left = x + (row % rows).to(tl.int64)[:, None] * x_row + depth[None, :]
    right = weight + (column % out).to(tl.int64)[:, None] * (width * BITS // 8) + stored[None, :]
    sums = tl.zeros((ROWS, OUT), tl.float32)
    for start in range(0, width, WIDTH):
        a = tl.load(left + start, mask=(start + depth < width)[None, :], other=0)
        inside = start * BITS // 8 + stored < width * BITS // 8
        b = tl.load(right + start * BITS // 8, mask=inside[None, :], other=0)
        if BITS == 4:
            b = tl.reshape(tl.join((b << 4) >> 4, b >> 4), (OUT, WIDTH))
        factor = tl.load(scale + (column % out) * (width // block) + start // block).to(tl.float32)
        sums += tl.dot(a, tl.trans(b.to(a.dtype))) * factor[None, :]
    if has_bias:
        sums += tl.load(bias + column % out).to(tl.float32)[None, :]
    place = y + row.to(tl.int64)[:, None] * out + column[None, :]
    tl.store(place, sums.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (column < out)[None, :])


PRODUCT = Kernel(
    rounded_product,
    grid=(("out", 128), ("rows", 128)),
    constants={"FLOAT8": False, "ROWS": 128, "OUT": 128, "WIDTH": 64},
    floats="step scale bias y",
    singles="steps",
    bytes="x weight",
    multiples="width out",
    warps=8,
    types=("bfloat16",),
)
WIDENED = PRODUCT._replace(
    function=widened_product,
    constants={"BITS": 8, "ROWS": 128, "OUT": 128, "WIDTH": 64},
    floats="x scale bias y",
    singles="",
    bytes="weight",
    multiples="width out x_row",
)
KERNELS = (
    Kernel(
        round_rows,
        grid=(("rows", 1),),
        constants={"WIDTH": 2048},
        floats="x smooth step",
        singles="steps",
        bytes="rounded",
        multiples="width x_row",
        warps=8,
        types=("bfloat16",),
    ),
    PRODUCT._replace(name="rounded_product.int8"),
    PRODUCT._replace(name="rounded_product.float8", constants={**PRODUCT.constants, "FLOAT8": True}),
    WIDENED._replace(name="widened_product.int8"),
    WIDENED._replace(name="widened_product.int4", constants={**WIDENED.constants, "BITS": 4}),
)
"""Products in bfloat16 alone, which quantized bundles compute in."""
