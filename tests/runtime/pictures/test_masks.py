"""Masks against diffusers' processor and torch's resizing; DiffSynth-Studio's is spelt out with torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw
from torch.nn import functional as F

from zimgkit.engines.errors import UsageError
from zimgkit.runtime.pictures.masks import blur, latent_mask, mask_of_alpha, read_mask, remarks, soft_latent_mask

SIZES = [(64, 96), (96, 64), (256, 256), (208, 16), (272, 144)]
"""Heights and widths of pictures."""
DRAWN = [(64, 96), (65, 97), (30, 31), (500, 333), (7, 200), (1, 1)]
"""Heights and widths of masks."""


def drawn(height: int, width: int, mode: str = "L") -> Image.Image:
    """Soft shapes, with every grey."""
    noise = np.random.default_rng(height).normal(size=(height, width)).cumsum(0).cumsum(1)
    grey = (255 * (0.5 + np.arctan(noise / 9) / math.pi)).astype(np.uint8)
    picture = Image.fromarray(grey)
    ImageDraw.Draw(picture).ellipse((width // 4, height // 4, width // 2, height // 2), fill=255)
    return picture.convert(mode)


def of_diffusers(mask: Image.Image, height: int, width: int) -> np.ndarray:
    """``prepare_mask_latents`` of the inpainting pipelines."""
    processor = VaeImageProcessor(vae_scale_factor=16, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    found = processor.preprocess(mask, height=height, width=width)
    return F.interpolate(found, size=(height // 8, width // 8), mode="nearest")[0, 0].numpy()


def of_diffsynth(mask: Image.Image, height: int, width: int, size: int | None, sigma: float | None) -> np.ndarray:
    """``QwenImageUnit_Inpaint``, with the kernel of torchvision's ``GaussianBlur``."""
    resized = mask.convert("RGB").resize((width // 8, height // 8))
    found = torch.Tensor(np.array(resized, dtype=np.float32)) * (1 / 255)
    found = found.permute(2, 0, 1)[None].mean(dim=1, keepdim=True)
    if size is not None and sigma is not None:
        limit = 2 * size / (2 * math.sqrt(2))
        kernel = torch.softmax(-((torch.linspace(-limit, limit, 2 * size + 1) / sigma) ** 2), dim=0)
        found = F.conv2d(F.pad(found, [size] * 4, mode="reflect"), (kernel[:, None] * kernel)[None, None])
    return found[0, 0].numpy()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_read_mask_of_any_mode(mode: str) -> None:
    grey = drawn(30, 31)
    picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    mask = read_mask(picture)
    assert mask.dtype == np.float32
    assert np.array_equal(mask, np.asarray(grey, np.float32) / 255)


@pytest.mark.parametrize("mode", ["1", "P"])
def test_read_mask_of_few_levels(mode: str) -> None:
    grey = drawn(30, 31).point(lambda value: 255 * (value > 99))
    assert np.array_equal(read_mask(grey.convert(mode)), np.asarray(grey, np.float32) / 255)
    assert np.array_equal(read_mask(np.asarray(grey) > 99), np.asarray(grey, np.float32) / 255)


def test_what_is_transparent_is_kept() -> None:
    """White strokes on nothing, whatever colour the file has below nothing."""
    picture = Image.new("RGBA", (4, 1), (255, 255, 255, 0))
    picture.putpixel((1, 0), (255, 255, 255, 255))
    picture.putpixel((2, 0), (255, 255, 255, 128))
    assert (read_mask(picture) * 255).round().tolist() == [[0, 255, 128, 0]]


def test_mask_of_alpha() -> None:
    picture = Image.new("RGBA", (3, 1), (9, 9, 9, 255))
    picture.putpixel((1, 0), (9, 9, 9, 0))
    assert mask_of_alpha(picture).tolist() == [[0, 1, 0]]
    assert mask_of_alpha(picture.convert("RGB")).tolist() == [[0, 0, 0]]


def test_a_mask_that_cannot_be_read() -> None:
    with pytest.raises(UsageError, match="mask /nowhere does not exist"):
        read_mask("/nowhere")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("from_size", DRAWN)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_latent_mask_is_that_of_diffusers(size: tuple[int, int], from_size: tuple[int, int], mode: str) -> None:
    picture = drawn(*from_size, mode)
    ours = latent_mask(read_mask(picture), *size)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, of_diffusers(picture, *size))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("from_size", DRAWN)
def test_soft_latent_mask_is_that_of_diffsynth(size: tuple[int, int], from_size: tuple[int, int]) -> None:
    picture = drawn(*from_size)
    mask = read_mask(picture)
    np.testing.assert_allclose(soft_latent_mask(mask, *size), of_diffsynth(picture, *size, None, None), atol=1e-6)
    for kernel in [(0, 1.0), (1, 1.5), (1, 0.1), (1, 40.0), (5, 1.5), (7, 12.0)]:
        if kernel[0] < min(size) // 8:
            ours = soft_latent_mask(mask, *size, *kernel)
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, of_diffsynth(picture, *size, *kernel), rtol=0, atol=1e-6)


def test_a_blur_takes_both_numbers() -> None:
    mask = read_mask(drawn(64, 64))
    expected = soft_latent_mask(mask, 64, 64)
    for half in ({"blur_size": 3}, {"blur_sigma": 3.0}):
        assert np.array_equal(soft_latent_mask(mask, 64, 64, **half), expected)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ((8, 1.0), "inpaint_blur_size is 8; give 0 ... 7 for a picture of 96x64"),
        ((10**12, 1.0), "inpaint_blur_size"),
        ((-1, 1.0), "inpaint_blur_size is -1"),
        ((1, 0.0), "inpaint_blur_sigma is 0"),
        ((1, -1.0), "inpaint_blur_sigma"),
        ((1, math.nan), "inpaint_blur_sigma is nan"),
    ],
)
def test_refuses_kernels(kernel: tuple[int, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        soft_latent_mask(read_mask(drawn(64, 96)), 64, 96, *kernel)


@pytest.mark.parametrize("radius", [0, 0.5, 4, 33, 200])
def test_blur_is_that_of_diffusers(radius: float) -> None:
    picture = drawn(65, 97)
    theirs = np.asarray(VaeImageProcessor.blur(picture, radius), np.float32) / 255
    assert np.array_equal(blur(read_mask(picture), radius), theirs)


def test_remarks() -> None:
    fine = np.zeros((64, 96), np.float32)
    fine[8:40, 8:40] = 1
    spot = np.zeros((64, 96), np.float32)
    spot[1, 1] = 1

    def told(mask: Any, height: int = 64, width: int = 96) -> str:
        return "|".join(remarks(mask, height, width))

    assert not told(fine)
    assert not told(fine, 128, 192)
    assert not told(np.pad(fine, ((0, 1), (0, 0))))
    assert told(fine, 64, 64) == "mask is 96x64 and is stretched to the picture's 64x64"
    assert told(fine * 0) == "mask is black: nothing is painted anew; white is"
    assert told(fine * np.float32(0.4)).startswith("mask is black")
    assert told(fine * 0 + 1) == "mask is white: everything is painted anew; black is kept"
    assert told(spot).startswith("mask has white spots smaller than 8x8 pixels only")
    assert told(fine.T * 0).count("|") == 1
