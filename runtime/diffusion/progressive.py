"""The first steps at half the size, after Spectral Progressive Diffusion (arXiv 2605.18736).

While much noise is in the latents, their high frequencies are noise alone. In the orthonormal DCT the low frequencies
of a picture with r times the sides are r times those of the small one, and noise has the same strength in all. So

    small    (1 - s) x + s n
    whole    (1 - sigma) r x + sigma n    at the low frequencies

show the same where s / (1 - s) is sigma / (1 - sigma) / r. Steps at the small size are taken at those levels s. Then
what they have reached is scaled by (1 - sigma) / (1 - s) r = sigma / s, and the high frequencies are those of the noise
that the whole would have begun with.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

PATCH = 16
"""Pixels of a token's sides."""


def half_size(height: int, width: int) -> tuple[int, int]:
    """Half of a size in pixels, in whole tokens: an odd number of them is rounded up."""
    tall, wide = (-(-side // PATCH // 2) * PATCH for side in (height, width))
    return tall, wide


def levels_at(sigmas: Array, ratio: float) -> Array:
    """The noise levels, float32 (N,), at which a smaller picture shows as much as a whole one at ``sigmas``.

    Args:
        sigmas: float32 (N,), of the whole.
        ratio: of the sides, above 1; 2 gives s / (2 - s).
    """
    levels: Array = sigmas / (np.float32(ratio) + (np.float32(1) - np.float32(ratio)) * sigmas)
    return levels


def low_frequencies(latents: Array, rows: int, columns: int) -> Array:
    """Latents (..., h, w) at a smaller size, (..., rows, columns); noise of unit strength stays that."""
    down, across = _resizing(latents.shape[-2], rows), _resizing(latents.shape[-1], columns)
    found: Array = (down @ latents @ across.T).astype(np.float32, copy=False)
    return found


def with_low_frequencies(latents: Array, low: Array) -> Array:
    """Latents (..., h, w) whose low frequencies are those of smaller ones, (..., rows, columns)."""
    rows, columns = low.shape[-2:]
    down, across = _resizing(latents.shape[-2], rows), _resizing(latents.shape[-1], columns)
    change = down.T @ (low - low_frequencies(latents, rows, columns)) @ across
    found: Array = latents + change.astype(np.float32, copy=False)
    return found


@functools.lru_cache(maxsize=16)
def _resizing(many: int, few: int) -> Array:
    """(few, many): to the frequencies of many numbers, and back from the first few of them."""
    found: Array = (_dct(few).T @ _dct(many)[:few]).astype(np.float32)
    return found


def _dct(count: int) -> NDArray[Any]:
    """The orthonormal DCT-II of so many numbers, a matrix of float64."""
    index = np.arange(count)
    matrix = np.cos(np.pi / count * index[:, None] * (index + 0.5)) * math.sqrt(2 / count)
    matrix[0] /= math.sqrt(2)
    return matrix
