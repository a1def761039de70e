"""Measures of similarity: of two arrays cosine and relative L2 error, of two pictures PSNR and SSIM."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

SIDE, SIGMA = 11, 1.5
"""SSIM's window, a Gaussian, in pixels."""
K1, K2 = 0.01, 0.03
"""SSIM's constants, which keep its fractions finite where a picture is flat."""


def cosine(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The cosine of the angle between two arrays; 1 where both are zero, 0 where one is."""
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    norms = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norms if norms else float(np.array_equal(a, b))


def relative_l2_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The L2 norm of the difference over that of ``expected``; infinite where only ``expected`` is zero."""
    difference = float(np.linalg.norm(found.astype(np.float64) - expected))
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    return difference / norm if norm else float(np.inf if difference else 0)


def psnr(squared_error: float) -> float | None:
    """The peak signal-to-noise ratio in dB of two pictures with values from 0 to 1; None where they are equal.

    Args:
        squared_error: the mean of their squared differences.
    """
    return -10 * float(np.log10(squared_error)) if squared_error else None


def ssim(found: Array, expected: Array) -> float:
    """The structural similarity (SSIM) of two pictures with values from 0 to 1; 1 where they are equal.

    Equation 13 of Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment: From Error Visibility to Structural
    Similarity" (2004), with their constants and window, averaged over all positions where the window fits and over
    channels.

    Args:
        found: (height, width, channels) float32, height and width at least 11.
        expected: of the same shape.
    """
    x, y = found.astype(np.float64), expected.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float((luminance * structure).mean())


def _blur(picture: NDArray[np.float64]) -> NDArray[np.float64]:
    """The Gaussian-weighted means of a picture (height, width, channels) at all positions where the window fits."""
    offsets = np.arange(SIDE) - SIDE // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(picture, SIDE, axis)
        picture = windows @ (weights / weights.sum())
    return picture
