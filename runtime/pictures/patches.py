"""Pictures as the patches that vision towers take in, as transformers' image processors cut them with torchvision.

``AutoProcessor`` takes those where torchvision is installed, as it mostly is; without it, what is resized differs
(see :mod:`zimgkit.runtime.pictures.resampling`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.decoding import Count, Number, Positive, decoded
from zimgkit.engines.errors import CheckpointError
from zimgkit.runtime.pictures.reading import flattened
from zimgkit.runtime.pictures.resampling import resize_as_torchvision
from zimgkit.runtime.pictures.resizing import check_aspect

if TYPE_CHECKING:
    from PIL.Image import Image

Side = Annotated[int, msgspec.Meta(ge=1, le=256)]
MostPatches = Annotated[int, msgspec.Meta(ge=1, le=1 << 14)]
Color = tuple[Number, Number, Number]
Deviation = tuple[Positive, Positive, Positive]


class _Size(msgspec.Struct, frozen=True):
    shortest_edge: Count | None = None
    longest_edge: Annotated[int, msgspec.Meta(ge=1, le=1 << 28)] | None = None


class Preprocessor(msgspec.Struct, frozen=True):
    """What is read of ``processor/preprocessor_config.json``; the defaults are those of Qwen2.5-VL's checkpoints.

    transformers' own default of ``max_pixels`` is lower, below a megapixel.
    """

    min_pixels: Count | None = None
    max_pixels: Annotated[int, msgspec.Meta(ge=1, le=1 << 28)] | None = None
    size: _Size | None = None
    patch_size: Side = 14
    merge_size: Side = 2
    temporal_patch_size: Side = 2
    image_mean: Color = (0.48145466, 0.4578275, 0.40821073)
    image_std: Deviation = (0.26862954, 0.26130258, 0.27577711)

    def pixels(self) -> tuple[int, int]:
        """How many pixels a resized picture has at least, and at most."""
        size = self.size or _Size()
        return (
            self.min_pixels or size.shortest_edge or 56 * 56,
            self.max_pixels or size.longest_edge or 12_845_056,
        )


def preprocessor(config: Mapping[str, Any], where: str = "processor") -> Preprocessor:
    """Read how pictures are prepared from ``preprocessor_config.json``.

    Raises:
        CheckpointError: a key is of another type or out of its bounds.
    """
    return decoded(config, Preprocessor, where, CheckpointError)


class Patches(NamedTuple):
    """Patches of one or more pictures, one picture after the other."""

    pixel_values: NDArray[np.float32]
    """float32 (patches, 3 * temporal_patch_size * patch_size**2): each group of merge_size**2 patches together."""
    image_grid_thw: NDArray[np.int64]
    """int64 (pictures, 3): frames, which is 1, and rows and columns of patches."""


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width that a tower takes in, as ``smart_resize`` of transformers' Qwen2-VL.

    Args:
        height: of the picture, in pixels.
        width: likewise.
        factor: what both become multiples of.
        min_pixels: how many there must be.
        max_pixels: how many there may be.

    Raises:
        UsageError: one side is more than 200 times as long as the other.
    """
    check_aspect(width / height)
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        rows, columns = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif rows * columns < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return rows, columns


def merged_patches(pictures: Sequence[Image], config: Preprocessor | None = None) -> Patches:
    """Pictures as Qwen2.5-VL's tower takes them in, as ``Qwen2VLImageProcessor`` of transformers makes them.

    Args:
        pictures: RGB or RGBA, one or more.
        config: of the checkpoint.

    Raises:
        UsageError: a picture is more than 200 times as wide as high, or as high as wide.
    """
    config = config or Preprocessor()
    found = [_merged(picture, config) for picture in pictures]
    return Patches(
        np.concatenate([values for values, _ in found]), np.array([(1, *grid) for _, grid in found], np.int64)
    )


def _merged(picture: Image, config: Preprocessor) -> tuple[NDArray[np.float32], tuple[int, int]]:
    patch, merge = config.patch_size, config.merge_size
    height, width = smart_resize(picture.height, picture.width, patch * merge, *config.pixels())
    resized = resize_as_torchvision(np.asarray(flattened(picture)), height, width, "bicubic")
    pixels = normalized(resized, config.image_mean, config.image_std)
    rows, columns = height // patch, width // patch
    cut = pixels.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    # Groups of patches, patches in a group, channels, pixels in a patch. A picture is a video of equal frames.
    cut = cut.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    frames = np.repeat(cut, config.temporal_patch_size, axis=5)
    return frames.reshape(rows * columns, -1), (rows, columns)


class PaddedPatches(NamedTuple):
    """Patches of one picture, padded to a number."""

    pixel_values: NDArray[np.float32]
    """float32 (1, max_num_patches, patch_size**2 * 3), zeros where there is no patch."""
    pixel_attention_mask: NDArray[np.int64]
    """int64 (1, max_num_patches), 1 where there is one."""
    spatial_shapes: NDArray[np.int64]
    """int64 (1, 2): rows and columns of patches."""


class PatchPreprocessor(msgspec.Struct, frozen=True):
    """What is read of SigLIP 2's ``preprocessor_config.json``; the defaults are transformers'."""

    patch_size: Side = 16
    max_num_patches: MostPatches = 256
    """How many a picture has at most, to which it is enlarged or reduced."""
    image_mean: Color = (0.5, 0.5, 0.5)
    image_std: Deviation = (0.5, 0.5, 0.5)


def padded_patches(picture: Image, config: PatchPreprocessor | None = None) -> PaddedPatches:
    """A picture as SigLIP 2 takes it in, as ``Siglip2ImageProcessor`` of transformers makes it.

    Args:
        picture: RGB or RGBA.
        config: of the checkpoint.
    """
    config = config or PatchPreprocessor()
    patch_size, max_num_patches = config.patch_size, config.max_num_patches
    height, width = patched_size(picture.height, picture.width, patch_size, max_num_patches)
    resized = resize_as_torchvision(np.asarray(flattened(picture)), height, width, "bilinear")
    rows, columns = height // patch_size, width // patch_size
    pixels = normalized(resized, config.image_mean, config.image_std).reshape(rows, patch_size, columns, patch_size, 3)
    values = np.zeros((1, max_num_patches, patch_size**2 * 3), np.float32)
    values[0, : rows * columns] = pixels.transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
    mask = np.arange(max_num_patches)[None] < rows * columns
    return PaddedPatches(values, mask.astype(np.int64), np.array([[rows, columns]], np.int64))


def patched_size(height: int, width: int, patch_size: int, max_num_patches: int) -> tuple[int, int]:
    """The largest height and width of at most so many patches, by bisection: ``get_image_size_for_max_num_patches``."""

    def scaled(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(side * scale / patch_size)) for side in (height, width))
        return rows * patch_size, columns * patch_size

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        rows, columns = (side // patch_size for side in scaled(middle))
        low, high = (middle, high) if rows * columns <= max_num_patches else (low, middle)
    return scaled(low)


def normalized(pixels: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """Levels 0...255 at mean 0 and deviation 1, with one rounding fewer than by way of 0...1."""
    shift, scale = (np.asarray(values, np.float32) * np.float32(255) for values in (mean, std))
    normalized: NDArray[np.float32] = (pixels.astype(np.float32) - shift) / scale
    return normalized
