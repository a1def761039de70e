"""Sizes and pixels against diffusers; DiffSynth-Studio's rules are Pillow's own calls."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image

from zimgkit.engines.errors import UsageError
from zimgkit.runtime.pictures.resizing import (
    area_dimensions,
    calculate_dimensions,
    capped_dimensions,
    crop,
    crop_and_resize,
    resize,
    to_pixels,
)

RNG = np.random.default_rng(0)
SIZES = [(64, 96), (97, 65), (31, 200), (333, 111), (1, 5)]


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, channels), dtype=np.uint8))


@pytest.mark.parametrize("area", [1024 * 1024, 384 * 384, 640 * 640])
def test_calculate_dimensions(area: int) -> None:
    for width, height in RNG.integers(40, 8000, (300, 2)).tolist():
        theirs = pipeline_qwenimage_edit.calculate_dimensions(area, width / height)
        assert (*calculate_dimensions(area, width / height), None) == theirs
        assert theirs[:2] == pipeline_qwenimage_edit_plus.calculate_dimensions(area, width / height)
    assert calculate_dimensions(1024 * 1024, 16 / 9) == (1376, 768)
    assert min(calculate_dimensions(384 * 384, 200)) == 32


@pytest.mark.parametrize("ratio", [201, 1 / 201])
def test_refuses_strips(ratio: float) -> None:
    with pytest.raises(UsageError, match="crop it to 200 at most"):
        calculate_dimensions(1024 * 1024, ratio)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [3, 4])
def test_resize_is_that_of_diffusers(size: tuple[int, int], channels: int) -> None:
    picture, processor = noise(*size, channels), VaeImageProcessor(vae_scale_factor=16)
    for width, height in (*SIZES, size):
        assert resize(picture, width, height) == processor.resize(picture, height, width)
        # DiffSynth-Studio leaves the filter to Pillow.
        assert resize(picture, width, height, "bicubic") == picture.resize((width, height))


@pytest.mark.parametrize("size", [(64, 96), (144, 80), (16, 16)])
@pytest.mark.parametrize("channels", [3, 4])
def test_to_pixels(size: tuple[int, int], channels: int) -> None:
    picture = noise(*size, channels)
    ours = to_pixels(picture)
    theirs = VaeImageProcessor(vae_scale_factor=16, vae_latent_channels=16).preprocess(picture).numpy()
    assert ours.dtype == np.float32
    assert ours.flags.c_contiguous
    assert np.array_equal(ours, theirs)


def test_sizes_of_several_pictures() -> None:
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    for width, height in RNG.integers(64, 3000, (20, 2)).tolist():
        picture = Image.new("L", (width, height))
        assert area_dimensions(width, height, 50_000) == processor._resize_to_target_area(picture, 50_000).size
    picture = noise(101, 83)
    assert (
        to_pixels(crop(picture, 96, 80)).tolist()
        == processor.preprocess(picture, height=80, width=96, resize_mode="crop").tolist()
    )


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 50), (96, 48)), ((1024, 1024), (1024, 1024)), ((4000, 3000), (1168, 880))]
)
def test_capped_dimensions(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert capped_dimensions(*size, 1024 * 1024, 16) == expected


def test_refuses_what_is_below_a_token() -> None:
    with pytest.raises(UsageError, match="no side may be below 16"):
        capped_dimensions(100, 15, 1024 * 1024, 16)


@pytest.mark.parametrize("size", [(97, 65), (64, 64), (31, 200), (16, 16)])
def test_crop_and_resize_covers(size: tuple[int, int]) -> None:
    picture = noise(*size)
    found = crop_and_resize(picture, 64, 48)
    assert found.size == (64, 48)
    scale = max(64 / size[0], 48 / size[1])
    whole = np.asarray(picture.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BILINEAR))
    top, left = round((len(whole) - 48) / 2), round((whole.shape[1] - 64) / 2)
    assert np.array_equal(found, whole[top : top + 48, left : left + 64])
