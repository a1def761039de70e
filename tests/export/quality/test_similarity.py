"""Measures of likeness against torch's convolutions and plain formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zimgkit.export.quality.similarity import cosine, psnr, relative_l2_error, ssim


def torch_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """With a window of two dimensions, one convolution per moment, and the three factors of equations 6, 9 and 10."""
    a, b = (torch.from_numpy(picture).double().permute(2, 0, 1)[:, None] for picture in (x, y))
    grid = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-(grid[:, None] ** 2 + grid[None] ** 2) / 4.5)
    window = (window / window.sum())[None, None]
    mu_a, mu_b = F.conv2d(a, window), F.conv2d(b, window)
    var_a, var_b = F.conv2d(a * a, window) - mu_a * mu_a, F.conv2d(b * b, window) - mu_b * mu_b
    cov = F.conv2d(a * b, window) - mu_a * mu_b
    c1, c2 = 1e-4, 9e-4
    sigma = torch.sqrt(var_a.clamp(min=0) * var_b.clamp(min=0))
    luminance = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    contrast = (2 * sigma + c2) / (var_a + var_b + c2)
    structure = (cov + c2 / 2) / (sigma + c2 / 2)
    return float((luminance * contrast * structure).mean())


@pytest.mark.parametrize("shape", [(11, 11, 3), (16, 40, 3), (33, 17, 1)])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3, 1.0])
def test_ssim(shape, noise):
    rng = np.random.default_rng([*shape, int(100 * noise)])
    x = rng.random(shape, dtype=np.float32)
    y = np.clip(x + noise * rng.standard_normal(shape), 0, 1).astype(np.float32)
    assert ssim(x, y) == pytest.approx(torch_ssim(x, y), abs=1e-6)
    assert ssim(x, y) == pytest.approx(ssim(y, x))
    if not noise:
        assert ssim(x, y) == pytest.approx(1)


def test_ssim_of_flat_pictures():
    """What is left of the formula where nothing varies."""
    white, grey = np.ones((16, 16, 3), np.float32), np.full((16, 16, 3), 0.5, np.float32)
    assert ssim(white, white) == pytest.approx(1)
    assert ssim(white, grey) == pytest.approx((1 + 1e-4) / (1.25 + 1e-4), abs=1e-6)


def test_psnr():
    assert psnr(0.0) is None
    assert psnr(1.0) == 0
    assert psnr(1e-3) == pytest.approx(30)


def test_cosine_and_relative_l2_error():
    rng = np.random.default_rng(0)
    for _ in range(5):
        a, b = rng.standard_normal((2, 3, 40)).astype(np.float32)
        expected = F.cosine_similarity(*(torch.from_numpy(v).double().flatten() for v in (a, b)), dim=0)
        assert cosine(a, b) == pytest.approx(float(expected))
        assert cosine(a, 2 * a) == pytest.approx(1)
        difference, norm = (torch.from_numpy(v).double().norm() for v in (a - b, b))
        assert relative_l2_error(a, b) == pytest.approx(float(difference / norm))
        assert relative_l2_error(1.5 * a, a) == pytest.approx(0.5)
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert (cosine(zero, zero), cosine(zero, one)) == (1, 0)
    assert (relative_l2_error(zero, zero), relative_l2_error(one, zero)) == (0, math.inf)
