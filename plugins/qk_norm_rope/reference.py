"""The operator in numpy: what its kernels are judged by."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


def qk_norm_rope(x: Array, weight: Array, cos: Array, sin: Array, *, epsilon: float) -> Array:
    """Normalize and rotate; see :mod:`zimgkit.plugins.qk_norm_rope.definition`.

    Args:
        x: (batch, tokens, heads, width).
        weight: (width,).
        cos: (batch, tokens, width / 2).
        sin: as ``cos``.
        epsilon: of the norm.

    Returns:
        (batch, heads, tokens, width).
    """
    return _rotated(_normed(x, weight, epsilon), cos, sin)


def joint_qk_norm_rope(
    context: Array, context_weight: Array, x: Array, weight: Array, cos: Array, sin: Array, *, epsilon: float
) -> Array:
    """The same of a context's tokens, which are normalized by other weights, and then those of ``x``."""
    tokens = [_normed(context, context_weight, epsilon), _normed(x, weight, epsilon)]
    return _rotated(np.concatenate(tokens, axis=1), cos, sin)


def _normed(x: Array, weight: Array, epsilon: float) -> Array:
    normed: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight
    return normed


def _rotated(x: Array, cos: Array, sin: Array) -> Array:
    cos, sin = cos[:, :, None], sin[:, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return pairs.reshape(x.shape).swapaxes(1, 2)
