"""Masks: white is painted anew, black is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import UsageError
from zimgkit.runtime.pictures.reading import read_picture

if TYPE_CHECKING:
    from PIL.Image import Image

Mask = NDArray[np.float32]
SCALE = 8
"""Pixels of a picture that one of its latents stands for, along a side."""
ASPECT = 0.02
"""How much of its aspect ratio a mask may lose unsaid: the rounding of one that was resized beside its picture."""


def read_mask(source: Any, name: str = "mask") -> Mask:
    """Read a mask from what :func:`read_picture` reads: the brightness of its pixels, of transparent ones black.

    Of colours it is the luma, as Pillow and diffusers have it; DiffSynth-Studio takes the mean of the channels.

    Args:
        source: of any mode, or an array.
        name: what messages call it.

    Returns:
        float32 (H, W) from 0 to 1, in levels of 1/255.

    Raises:
        UsageError: see :func:`read_picture`.
    """
    from PIL import Image

    picture = read_picture(source, name)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
    return _levels(picture.convert("L"))


def mask_of_alpha(picture: Image) -> Mask:
    """The mask that a picture's own transparency is, as OpenAI's edits have it: transparent pixels are painted anew.

    Args:
        picture: RGBA; an RGB one has no such pixels.

    Returns:
        float32 (H, W) from 0 to 1.
    """
    if picture.mode != "RGBA":
        return np.zeros((picture.height, picture.width), np.float32)
    return 1 - _levels(picture.getchannel("A"))


def latent_mask(mask: Mask, height: int, width: int) -> Mask:
    """A mask on the grid of latents, as ``QwenImageInpaintPipeline`` and ``ZImageInpaintPipeline`` make it.

    It is resized to the picture (Lanczos), each pixel becomes 0 or 1, and every eighth of them is taken.

    Args:
        mask: float32 (h, w) from 0 to 1.
        height: of the picture, in pixels; a multiple of 8.
        width: likewise.

    Returns:
        float32 (height / 8, width / 8) of 0 and 1.
    """
    from PIL.Image import Resampling

    resized = np.asarray(_picture(mask).resize((width, height), Resampling.LANCZOS))
    return (resized[::SCALE, ::SCALE] >= 128).astype(np.float32)


def soft_latent_mask(
    mask: Mask, height: int, width: int, blur_size: int | None = None, blur_sigma: float | None = None
) -> Mask:
    """A mask on the grid of latents, as DiffSynth-Studio makes it: resized at once (bicubic), with soft edges.

    Args:
        mask: float32 (h, w) from 0 to 1.
        height: of the picture, in pixels; a multiple of 8.
        width: likewise.
        blur_size: half the side of a Gaussian kernel, in latents. Nothing is blurred unless both are given.
        blur_sigma: its standard deviation, in latents.

    Returns:
        float32 (height / 8, width / 8) from 0 to 1.

    Raises:
        UsageError: the kernel does not fit into the grid, or its deviation is not above 0.
    """
    from PIL.Image import Resampling

    rows, columns = height // SCALE, width // SCALE
    grid = _levels(_picture(mask).resize((columns, rows), Resampling.BICUBIC))
    if blur_size is None or blur_sigma is None:
        return grid
    if not 0 <= blur_size < min(rows, columns):
        hint = f"give 0 ... {min(rows, columns) - 1} for a picture of {width}x{height}"
        raise UsageError(f"inpaint_blur_size is {blur_size}", hint)
    if not blur_sigma > 0:
        raise UsageError(f"inpaint_blur_sigma is {blur_sigma:g}", "give a number above 0")
    return _gaussian(_gaussian(grid, blur_size, blur_sigma).T, blur_size, blur_sigma).T


def blur(mask: Mask, radius: float) -> Mask:
    """A mask with soft edges, as diffusers' ``VaeImageProcessor.blur`` makes it.

    Args:
        mask: float32 (H, W) from 0 to 1.
        radius: the standard deviation of the blur, in pixels of the mask; 0 leaves it as it is.

    Returns:
        float32 (H, W) from 0 to 1.
    """
    from PIL import ImageFilter

    return _levels(_picture(mask).filter(ImageFilter.GaussianBlur(radius)))


def remarks(mask: Mask, height: int, width: int, name: str = "mask") -> list[str]:
    """What is worth a warning before a mask is used; empty where nothing is.

    Args:
        mask: float32 (h, w) from 0 to 1.
        height: of the picture as it was given, in pixels.
        width: likewise.
        name: what messages call it.
    """
    h, w = mask.shape
    found = []
    if not 1 - ASPECT <= (w * height) / (h * width) <= 1 + ASPECT:
        found.append(f"{name} is {w}x{h} and is stretched to the picture's {width}x{height}")
    if mask.max() < 0.5:
        found.append(f"{name} is black: nothing is painted anew; white is")
    elif mask.min() >= 0.5:
        found.append(f"{name} is white: everything is painted anew; black is kept")
    elif not latent_mask(mask, height, width).any():
        found.append(f"{name} has white spots smaller than {SCALE}x{SCALE} pixels only, which may not be painted anew")
    return found


def _gaussian(rows: Mask, size: int, sigma: float) -> Mask:
    """Blurred along the columns, mirrored at the edges, as torchvision's ``GaussianBlur`` does."""
    # torchvision spreads the kernel's numbers over +-size / sqrt(2), which is not their distance.
    places = np.linspace(-1, 1, 2 * size + 1) * (size / np.sqrt(2)) / sigma
    kernel = np.exp(-(places**2))
    kernel /= kernel.sum()
    padded = np.pad(rows.astype(np.float64), ((0, 0), (size, size)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis=1)
    blurred: Mask = (windows @ kernel).astype(np.float32)
    return blurred


def _levels(picture: Image) -> Mask:
    return np.asarray(picture, np.float32) / np.float32(255)


def _picture(mask: Mask) -> Image:
    from PIL import Image

    return Image.fromarray((mask * np.float32(255)).round().astype(np.uint8))
