"""Sizes of pictures that a model takes in, and pictures of these sizes: as diffusers makes them, or DiffSynth-Studio.

The two differ in their filters: diffusers resizes with Lanczos, DiffSynth-Studio with Pillow's own choice, bicubic.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

Filter = Literal["lanczos", "bicubic", "bilinear"]
MEGAPIXEL = 1024 * 1024
MULTIPLE = 32
MOST_ASPECT = 200.0
"""The longest side by the shortest, as Qwen2.5-VL's image processor takes it."""


def calculate_dimensions(area: int, ratio: float) -> tuple[int, int]:
    """Width and height of about this area, as ``QwenImageEditPipeline`` and DiffSynth-Studio choose them.

    Args:
        area: in pixels, such as 1024 * 1024.
        ratio: width by height of the picture.

    Returns:
        Width and height in pixels, multiples of 32.

    Raises:
        UsageError: one side is more than 200 times as long as the other.
    """
    check_aspect(ratio)
    width = math.sqrt(area * ratio)
    height = width / ratio
    return round(width / MULTIPLE) * MULTIPLE, round(height / MULTIPLE) * MULTIPLE


def check_aspect(ratio: float, name: str = "image", most: float = MOST_ASPECT) -> None:
    """Refuse what is much longer than wide, which no vision tower takes.

    Args:
        ratio: width by height.
        name: what messages call the picture.
        most: how many times a side may be as long as the other.

    Raises:
        UsageError: one side is longer than that.
    """
    longer = max(ratio, 1 / ratio)
    if longer > most:
        sides = f"{longer:.{0 if longer > 10 else 1}f} times as {'wide as high' if ratio > 1 else 'high as wide'}"
        raise UsageError(f"{name} is {sides}", f"crop it to {most:.0f} at most")


def area_dimensions(width: int, height: int, area: int) -> tuple[int, int]:
    """Width and height of a picture at this area, cut to whole pixels, as ``ZImageOmniPipeline`` resizes large ones."""
    scale = math.sqrt(area / (width * height))
    return max(1, int(width * scale)), max(1, int(height * scale))


def capped_dimensions(width: int, height: int, area: int, multiple: int) -> tuple[int, int]:
    """Width and height at this area at most, cut to a multiple, as DiffSynth-Studio's ``ImageCropAndResize`` has them.

    Raises:
        UsageError: a side is shorter than the multiple.
    """
    if width * height > area:
        scale = (width * height / area) ** 0.5
        width, height = int(width / scale), int(height / scale)
    if min(width, height) < multiple:
        raise UsageError(f"image is {width}x{height} at {area} pixels", f"no side may be below {multiple}")
    return width // multiple * multiple, height // multiple * multiple


def resize(picture: Image, width: int, height: int, kernel: Filter = "lanczos") -> Image:
    """A picture stretched to a size in pixels; one that has it stays as it is.

    Args:
        picture: RGB or RGBA.
        width: in pixels.
        height: in pixels.
        kernel: ``"lanczos"`` as diffusers' ``VaeImageProcessor``, ``"bicubic"`` as DiffSynth-Studio.
    """
    from PIL.Image import Resampling

    return picture.resize((width, height), Resampling[kernel.upper()])


def crop(picture: Image, width: int, height: int) -> Image:
    """The middle of a picture, as diffusers' ``Flux2ImageProcessor`` with ``resize_mode="crop"``."""
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def crop_and_resize(picture: Image, width: int, height: int, kernel: Filter = "bilinear") -> Image:
    """The middle of a picture resized to cover a size, as DiffSynth-Studio's ``ImageCropAndResize``."""
    scale = max(width / picture.width, height / picture.height)
    covering = resize(picture, round(picture.width * scale), round(picture.height * scale), kernel)
    left, top = round((covering.width - width) / 2), round((covering.height - height) / 2)
    return covering.crop((left, top, left + width, top + height))


def to_pixels(picture: Image) -> NDArray[np.float32]:
    """A picture as the VAE encoder takes it in, as diffusers' ``VaeImageProcessor`` makes it.

    Args:
        picture: RGB or RGBA.

    Returns:
        float32 (1, 3 or 4, H, W) from -1 to 1.
    """
    values = np.asarray(picture).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray((2 * values - 1).transpose(2, 0, 1)[None])
