"""The kernel, for the build alone: a program takes one token through gate, residual, norm, factor and shift."""

import triton
import triton.language as tl

from zimgkit.plugins.compile import Kernel


@triton.jit
def gate_norm_modulate(
    x,
    branch,
    branch_weight,
    gate,
    weight,
    factor,
    shift,
    smooth,
    step,
    residual,
    y,
    rounded,
    tokens,
    batch,
    width,
    x_batch,
    x_token,
    branch_batch,
    branch_token,
    gate_batch,
    gate_token,
    factor_batch,
    factor_token,
    shift_batch,
    shift_token,
    branch_epsilon,
    epsilon,
    has_branch,
    has_branch_norm,
    has_tanh,
    has_norm,
    has_mean,
    has_shift,
    has_smooth,
    bits,
    WIDTH: tl.constexpr,
):
    """(tokens, batch) programs; what a form of the operator leaves out comes as 0.

    ``bits`` is what ``y`` is rounded to: 0 for its own type, 1 for int8, 2 for float8. All is computed in float32; the
    residual is rounded before it is normalized, as those who read it later find it.
    """
    token, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    own = (picture * tokens + token) * width + column
    values = tl.load(x + picture * x_batch + token * x_token + column, mask=inside, other=0).to(tl.float32)
    if has_branch:
        place = picture * branch_batch + token * branch_token + column
        added = tl.load(branch + place, mask=inside, other=0).to(tl.float32)
        if has_branch_norm:
            scale = tl.load(branch_weight + column, mask=inside, other=0).to(tl.float32)
            added = added * tl.rsqrt(tl.sum(added * added, axis=0) / width + branch_epsilon) * scale
        place = picture * gate_batch + token * gate_token + column
        share = tl.load(gate + place, mask=inside, other=0).to(tl.float32)
        if has_tanh:
            # By its series where the quotient would cancel.
            square, decay = share * share, tl.exp(-2 * tl.abs(share))
            series = share * (1 + square * (-1 / 3 + square * (2 / 15 - square * 17 / 315)))
            quotient = (1 - decay) / (1 + decay)
            share = tl.where(square < 0.01, series, tl.where(share < 0, -quotient, quotient))
        values += share * added
        stored = values.to(residual.dtype.element_ty)
        tl.store(residual + own, stored, mask=inside)
        values = stored.to(tl.float32)
    if has_norm:
        if has_mean:
            values = tl.where(inside, values - tl.sum(values, axis=0) / width, 0)
        scale = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
        values = values * tl.rsqrt(tl.sum(values * values, axis=0) / width + epsilon) * scale
        place = picture * factor_batch + token * factor_token + column
        values *= tl.load(factor + place, mask=inside, other=0).to(tl.float32)
        if has_shift:
            place = picture * shift_batch + token * shift_token + column
            values += tl.load(shift + place, mask=inside, other=0).to(tl.float32)
        if bits == 0:
            tl.store(y + own, values.to(y.dtype.element_ty), mask=inside)
        else:
            if has_smooth:
                values *= tl.load(smooth + column, mask=inside, other=0).to(tl.float32)
            values /= tl.load(step).to(tl.float32)
            if bits == 1:
                # Adding and taking away 1.5 * 2 ** 23 rounds to whole numbers, halves to even.
                whole = tl.minimum(tl.maximum(values, -128), 127) + 12582912 - 12582912
                tl.store(rounded + own, whole.to(tl.int8), mask=inside)
            else:
                small = tl.minimum(tl.maximum(values, -448), 448).to(tl.float8e4nv)
                tl.store(rounded + own, small.to(tl.int8, bitcast=True), mask=inside)


KERNELS = (
    Kernel(
        gate_norm_modulate,
        grid=(("tokens", 1), ("batch", 1)),
        constants={"WIDTH": 4096},
        floats="x branch branch_weight gate weight factor shift smooth step residual y",
        bytes="rounded",
        multiples="width x_batch x_token branch_batch branch_token gate_batch gate_token factor_batch factor_token "
        "shift_batch shift_token",
        reals="branch_epsilon epsilon",
        limits={"width": 4096},
        warps=8,
    ),
)
