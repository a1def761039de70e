"""Pictures for encoders of one size: against torch, which torchvision calls, and Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from zimgkit.engines.errors import UsageError
from zimgkit.runtime.pictures.squares import IMAGENET_MEAN, IMAGENET_STD, dino_patches, middle_square, siglip_patches

RNG = np.random.default_rng(0)
SQUARE = RNG.integers(0, 256, (1024, 1024, 3), dtype=np.uint8)


def resized(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """(3, side, side)."""
    tensor = pixels.permute(2, 0, 1)[None].contiguous()
    return F.interpolate(tensor, size=(side, side), mode="bilinear", align_corners=False, antialias=True)[0]


def patches(pixels: torch.Tensor, patch: int) -> np.ndarray:
    """As a convolution of that stride sees them."""
    return F.unfold(pixels[None], patch, stride=patch)[0].T.numpy()


@pytest.mark.parametrize("size", [(60, 45), (25, 100), (1024, 1024), (1500, 1100), (3, 2)])
def test_the_middle(size):
    picture = Image.fromarray(RNG.integers(0, 256, (*reversed(size), 3), dtype=np.uint8))
    scale = max(1024 / side for side in size)
    whole = picture.resize([round(side * scale) for side in size], Image.Resampling.BILINEAR)
    left, top = (round((side - 1024) / 2) for side in whole.size)
    assert np.array_equal(middle_square(picture), np.asarray(whole.crop((left, top, left + 1024, top + 1024))))


def test_transparency_lies_over_white():
    assert (middle_square(Image.new("RGBA", (8, 8), (255, 0, 0, 0))) == 255).all()


def test_what_is_too_long():
    with pytest.raises(UsageError, match="picture 2"):
        middle_square(Image.new("RGB", (1000, 4)), "picture 2")


@pytest.mark.parametrize(("side", "patch"), [(384, 16), (224, 14)])
def test_for_siglip(side, patch):
    """Resized in 8 bits, to the bit."""
    expected = patches(resized(torch.from_numpy(SQUARE), side).float() / 127.5 - 1, patch)
    np.testing.assert_allclose(siglip_patches(SQUARE, side, patch), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("side", "patch"), [(224, 16), (96, 8)])
def test_for_dinov3(side, patch):
    """Resized in float32, as are the weights there: in noise that is as far as they differ."""
    mean, std = (torch.from_numpy(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = patches((resized(torch.from_numpy(SQUARE).float() / 255, side) - mean) / std, patch)
    found = dino_patches(SQUARE, side, patch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)
