"""Resizing against torch, which torchvision calls; patches against transformers, with nothing left to resize."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import Qwen2VLImageProcessorPil, Siglip2ImageProcessorPil
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as reference
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from zimgkit.engines.errors import CheckpointError, UsageError
from zimgkit.runtime.pictures.patches import (
    Preprocessor,
    merged_patches,
    padded_patches,
    patched_size,
    preprocessor,
    smart_resize,
)
from zimgkit.runtime.pictures.reading import flattened
from zimgkit.runtime.pictures.resampling import resize_as_torchvision

RNG = np.random.default_rng(0)
LIMITS = {"min_pixels": 3136, "max_pixels": 12_845_056}
SIZES = [(1, 1), (28, 28), (56, 84), (64, 64), (97, 61), (15, 400), (300, 17), (333, 517), (384, 384)]


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_resizing_is_that_of_torch(kernel: str) -> None:
    """To the bit; of extremes too, where a sum goes out of range."""
    sizes = RNG.integers(1, 120, (120, 4)).tolist()
    for height, width, rows, columns in [*sizes, (90, 90, 90, 90), (90, 80, 90, 120), (512, 512, 518, 518)]:
        for pixels in (noise(height, width), (noise(height, width) > 127) * np.uint8(255)):
            tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
            theirs = F.interpolate(tensor, size=(rows, columns), mode=kernel, align_corners=False, antialias=True)
            ours = resize_as_torchvision(pixels, rows, columns, kernel)
            assert ours.dtype == np.uint8
            np.testing.assert_array_equal(ours, theirs[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("limits", [(3136, 12_845_056), (3136, 12_544), (50_000, 60_000)])
def test_smart_resize(limits: tuple[int, int]) -> None:
    for height, width in RNG.integers(1, 5000, (300, 2)).tolist():
        try:
            expected = reference.smart_resize(height, width, 28, *limits)
        except ValueError:
            with pytest.raises(UsageError, match="crop it to 200"):
                smart_resize(height, width, 28, *limits)
        else:
            assert smart_resize(height, width, 28, *limits) == expected
    for side in (14, 42, 70):  # Halves, which round to even.
        assert smart_resize(side, 84, 28, *limits) == reference.smart_resize(side, 84, 28, *limits)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [3, 4])
def test_merged_patches(size: tuple[int, int], channels: int) -> None:
    picture = Image.fromarray(noise(*size, channels))
    ours = merged_patches([picture])
    processor = Qwen2VLImageProcessorPil(**LIMITS)
    theirs = processor(picture, return_tensors="np")
    assert np.array_equal(ours.image_grid_thw, theirs["image_grid_thw"])
    assert ours.pixel_values.dtype == np.float32
    assert ours.image_grid_thw.dtype == np.int64
    _, rows, columns = ours.image_grid_thw[0].tolist()
    exact = resize_as_torchvision(np.asarray(flattened(picture)), 14 * rows, 14 * columns, "bicubic")
    theirs = processor(Image.fromarray(exact), return_tensors="np")
    assert np.array_equal(ours.image_grid_thw, theirs["image_grid_thw"])
    np.testing.assert_allclose(ours.pixel_values, theirs["pixel_values"], rtol=0, atol=1e-6)


def test_several_pictures_one_after_the_other() -> None:
    pictures = [Image.fromarray(noise(56, 84)), Image.fromarray(noise(112, 56))]
    ours = merged_patches(pictures)
    theirs = Qwen2VLImageProcessorPil(**LIMITS)(pictures, return_tensors="np")
    assert ours.image_grid_thw.tolist() == [[1, 4, 6], [1, 8, 4]]
    np.testing.assert_allclose(ours.pixel_values, theirs["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        LIMITS,
        {"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}},
        {"min_pixels": 3136, "max_pixels": 12_544, "size": None},
        {"patch_size": 16, "merge_size": 1, "temporal_patch_size": 1, "image_mean": [0.5] * 3, "image_std": [0.25] * 3},
    ],
)
def test_the_checkpoints_own_numbers(config: dict) -> None:
    picture = Image.fromarray(noise(112, 112))
    ours = merged_patches([picture], preprocessor(config | {"image_processor_type": "Qwen2VLImageProcessorFast"}))
    theirs = Qwen2VLImageProcessorPil(**(LIMITS | config if "size" not in config else config))(
        picture, return_tensors="np"
    )
    assert np.array_equal(ours.image_grid_thw, theirs["image_grid_thw"])
    np.testing.assert_allclose(ours.pixel_values, theirs["pixel_values"], rtol=0, atol=1e-6)


def test_refuses_configs_and_strips() -> None:
    with pytest.raises(CheckpointError, match="processor: patch_size is '14'"):
        preprocessor({"patch_size": "14"})
    with pytest.raises(CheckpointError, match="image_std"):
        preprocessor({"image_std": [1, 1, 0]})
    with pytest.raises(UsageError, match="300 times as high as wide; crop it"):
        merged_patches([Image.new("RGB", (2, 600))])
    assert preprocessor({}) == Preprocessor()


def test_sizes_of_padded_patches() -> None:
    for height, width in [*RNG.integers(1, 3000, (60, 2)).tolist(), (256, 256), (1, 3000), (5000, 1)]:
        for most in (256, 64):
            assert patched_size(height, width, 16, most) == get_image_size_for_max_num_patches(height, width, 16, most)


@pytest.mark.parametrize("size", [(256, 256), (240, 272), (64, 64), (333, 517), (17, 300)])
def test_padded_patches(size: tuple[int, int]) -> None:
    picture = Image.fromarray(noise(*size))
    ours = padded_patches(picture)
    theirs = Siglip2ImageProcessorPil()(picture, return_tensors="np")
    assert np.array_equal(ours.spatial_shapes, theirs["spatial_shapes"])
    assert np.array_equal(ours.pixel_attention_mask, theirs["pixel_attention_mask"])
    assert ours.pixel_values.dtype == np.float32
    # Once it has its size it keeps it.
    exact = resize_as_torchvision(np.asarray(picture), *(16 * ours.spatial_shapes[0]).tolist(), "bilinear")
    theirs = Siglip2ImageProcessorPil()(Image.fromarray(exact), return_tensors="np")
    assert np.array_equal(ours.spatial_shapes, theirs["spatial_shapes"])
    np.testing.assert_allclose(ours.pixel_values, theirs["pixel_values"], rtol=0, atol=1e-6)
