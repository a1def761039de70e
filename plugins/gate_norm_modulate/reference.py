"""The operator in numpy: what its kernels are judged by."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.plugins.gate_norm_modulate.definition import Form

Array = NDArray[Any]


def gate_norm_modulate(
    form: Form, inputs: dict[str, Array], *, branch_epsilon: float = 0.0, epsilon: float = 0.0
) -> list[Array]:
    """One form; see :mod:`zimgkit.plugins.gate_norm_modulate.definition`.

    Args:
        form: which.
        inputs: by the names that the form has for them.
        branch_epsilon: of the branch's norm.
        epsilon: of the norm.

    Returns:
        The residual, where there is a gate, and ``y``, where there is a norm, rounded numbers as such.
    """
    value, results = inputs["x"], []
    if form.gate:
        share, branch = inputs["gate"], inputs["branch"]
        if form.gate == "tanh":
            share, branch = np.tanh(share), _normed(branch, branch_epsilon) * inputs["branch_weight"]
        value = value + share * branch
        results.append(value)
    if form.norm:
        if form.norm == "layer":
            value = value - value.mean(-1, keepdims=True)
        value = _normed(value, epsilon) * inputs["weight"] * inputs["factor"]
        value = value + inputs["shift"] if form.shift else value
        value = value * inputs["smooth"] if form.smooth else value
        if form.rounded == "int8":
            value = np.clip(np.rint(value / inputs["step"]), -128, 127)
        elif form.rounded:
            value = round_to_float8(value / inputs["step"])
        results.append(value)
    return results


def _normed(x: Array, epsilon: float) -> Array:
    normed: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
    return normed


def round_to_float8(values: Array) -> Array:
    """The nearest numbers that float8 E4M3 has: three bits of mantissa, exponents from -6 on, up to 448."""
    exponents = np.maximum(np.frexp(values)[1] - 1, -6)
    steps = np.ldexp(np.ones_like(values), exponents - 3)
    rounded: Array = np.clip(np.rint(values / steps) * steps, -448, 448)
    return rounded
