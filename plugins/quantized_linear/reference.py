"""The operator in numpy: what its kernels are judged by."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def quantized_linear(x: Array, step: Array, weight: Array, scale: Array, bias: Array | None = None) -> Array:
    """A product of integers or of float8; see :mod:`zimgkit.plugins.quantized_linear.definition`.

    Args:
        x: (..., in), as numbers.
        step: a scalar, or (..., 1), one for each row of ``x``.
        weight: (out, in), as numbers.
        scale: (out,).
        bias: (out,).

    Returns:
        (..., out) of the type of ``scale``.
    """
    return weights_linear(x.astype(scale.dtype) * step, weight, scale, bias)


def weights_linear(x: Array, weight: Array, scale: Array, bias: Array | None = None) -> Array:
    """Weights alone: ``scale`` is (out,), or (out, blocks), one for each block of a row."""
    blocks = weight.astype(scale.dtype).reshape(*scale.shape, -1) * scale[..., None]
    product: Array = x @ blocks.reshape(weight.shape).T
    return product if bias is None else product + bias


def round_rows(x: Array, step: Array | None, smooth: Array | None = None) -> tuple[Array, Array]:
    """Round (..., in) to int8 by a step, or by one for each row that takes its largest number to 127.

    Returns:
        The numbers, and the step or steps (..., 1).
    """
    x = x if smooth is None else x * smooth
    if step is None:
        step = np.maximum(np.abs(x).max(-1, keepdims=True) / 127, np.asarray(1e-30, x.dtype))
    return np.clip(np.rint(x / step), -128, 127), step
