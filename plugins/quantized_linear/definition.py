"""A linear whose weight has 8 or 4 bits: a product, its scales, and a bias; and the rounding of what it reads.

``QuantizedLinear(x, step, weight, scale)``:

- ``x`` (..., in) int8 or float8, times ``step``, a scalar; ``weight`` (out, in) of the same type, times ``scale``
  (out,), one for each row;
- result (..., out) of the type of ``step`` and ``scale``.

``QuantizedLinear_bias`` adds a bias (out,). ``QuantizedLinear_weights`` has an ``x`` that is not rounded and a weight
of int8 or float8, ``QuantizedLinear_blocks`` one of int4 with a scale for each ``block_size`` values of a row, (out,
in / block_size).

``RoundRows_int8(x, step)`` and ``RoundRows_float8(x, step)`` round to 8 bits, halves to even;
``RoundRows_smooth_int8(x, smooth, step)`` multiplies by ``smooth`` (in,) first.
"""

from __future__ import annotations

from zimgkit.plugins.definition import Definition


def _definition(kind: str, *, bias: bool) -> Definition:
    attributes, inputs, attribute = [], ["x", "weight", "scale"], "axis: int = 0"
    lines, left = [], "x"
    if kind == "blocks":
        attributes, attribute = ["block_size"], "axis: int = 1, block_size: int = @block_size"
    elif not kind:
        inputs.insert(1, "step")
        lines, left = ["wide_x = DequantizeLinear (x, step)"], "wide_x"
    lines += [
        f"wide = DequantizeLinear <{attribute}> (weight, scale)",
        "turned = Transpose <perm: ints = [1, 0]> (wide)",
        f"y = MatMul ({left}, turned)",
    ]
    if bias:
        inputs.append("bias")
        lines[-1:] = [f"product = MatMul ({left}, turned)", "y = Add (product, bias)"]
    name = "_".join(part for part in ("QuantizedLinear", kind, bias and "bias") if part)
    # One input is read by several linears.
    return Definition(name, tuple(attributes), tuple(inputs), ("y",), tuple(lines), shared=("DequantizeLinear",))


def _rounding(kind: str, dtype: int, *, smooth: bool) -> Definition:
    last = f"QuantizeLinear <output_dtype: int = {dtype}>"
    if smooth:
        lines: tuple[str, ...] = ("smoothed = Mul (x, smooth)", f"y = {last} (smoothed, step)")
        return Definition(f"RoundRows_smooth_{kind}", (), ("x", "smooth", "step"), ("y",), lines)
    return Definition(f"RoundRows_{kind}", (), ("x", "step"), ("y",), (f"y = {last} (x, step)",))


DEFINITIONS = (
    *(_definition(kind, bias=bias) for bias in (True, False) for kind in ("", "blocks", "weights")),
    *(_rounding("int8", 3, smooth=smooth) for smooth in (True, False)),
    _rounding("float8", 17, smooth=False),
)
"""Those with more parts come first."""
