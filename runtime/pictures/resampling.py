"""Resizing of 8-bit pictures as torchvision does it on tensors, to the bit.

Pillow and torch resize with the same filters (widened where a picture shrinks, so that every pixel counts), but with
weights of other precision: results differ by up to two levels, and by twenty in noise where Pillow (13.0)
finds it cheaper to go along the columns first. transformers' image processors use torchvision where it is installed.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Filter = Literal["bicubic", "bilinear"]
Bytes = NDArray[np.uint8]


def resize_as_torchvision(pixels: Bytes, height: int, width: int, kernel: Filter) -> Bytes:
    """Resize first along the rows, then along the columns, rounding to 8 bits after each.

    Args:
        pixels: uint8 (H, W, channels).
        height: wanted, in pixels.
        width: wanted, in pixels.
        kernel: the filter.

    Returns:
        uint8 (height, width, channels).
    """
    turned = _along(np.ascontiguousarray(pixels.swapaxes(0, 1)), width, kernel)
    return _along(np.ascontiguousarray(turned.swapaxes(0, 1)), height, kernel)


def _along(rows: Bytes, size: int, kernel: Filter) -> Bytes:
    """Rows mixed to ``size`` new ones."""
    if len(rows) == size:
        return rows
    places, weights, precision = _weights(len(rows), size, kernel)
    total = np.full((size, *rows.shape[1:]), 1 << (precision - 1), np.int32)
    for place, weight in zip(places.T, weights.T, strict=True):
        total += weight[:, None, None] * rows[place]
    levels: Bytes = np.clip(total >> precision, 0, 255).astype(np.uint8)
    return levels


def _weights(old: int, new: int, kernel: Filter) -> tuple[NDArray[np.int64], NDArray[np.int32], int]:
    """For each new place the old ones that it is mixed of, their weights, and of how many bits one is."""
    places, weights = _float_weights(old, new, kernel)
    # As many bits as leave the largest weight in 16, sign included.
    precision = next(bits for bits in range(22) if round(weights.max() * (2 << bits)) >= 1 << 15 or bits == 21)
    whole = np.trunc(weights * (1 << precision) + np.copysign(0.5, weights)).astype(np.int32)
    return np.minimum(places, old - 1), whole, precision


def mixing(old: int, new: int) -> NDArray[np.float32]:
    """How much each new place takes of each old one, bilinear: float32 (new, old), as torch with ``antialias``."""
    places, weights = _float_weights(old, new, "bilinear")
    found = np.zeros((new, old + places.shape[1]), np.float32)
    np.put_along_axis(found, places, weights.astype(np.float32), axis=1)
    return found[:, :old]


def _float_weights(old: int, new: int, kernel: Filter) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each new place the old ones that it is mixed of, and their weights: 0 of those past the end."""
    scale = old / new
    support = (2 if kernel == "bicubic" else 1) * max(scale, 1.0)
    center = scale * (np.arange(new) + 0.5)
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    last = np.minimum((center + support + 0.5).astype(np.int64), old)
    places = first[:, None] + np.arange((last - first).max())
    distance = np.abs((places - center[:, None] + 0.5) / max(scale, 1.0))
    weights = np.where(places < last[:, None], _FILTERS[kernel](distance), 0)
    return places, weights / weights.sum(axis=1, keepdims=True)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel with a = -1/2."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _bilinear(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(1 - x, 0)


_FILTERS = {"bicubic": _bicubic, "bilinear": _bilinear}
