"""A picture as the encoders of one fixed size take it in: its middle, a square, as patches of normalized pixels.

What is cut out is DiffSynth-Studio's choice, a square of 1024 pixels. Then an encoder's image processor of
transformers resizes it, with torchvision (see :mod:`.resampling`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from zimgkit.runtime.pictures.patches import normalized
from zimgkit.runtime.pictures.reading import flattened
from zimgkit.runtime.pictures.resampling import mixing, resize_as_torchvision
from zimgkit.runtime.pictures.resizing import check_aspect, crop_and_resize

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 1024
"""Of the square, in pixels."""
MOST_ASPECT = 50.0
"""By how much longer pictures are refused: of what is enlarged to cover the square nearly nothing would remain."""
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


def middle_square(picture: Image, name: str = "image") -> NDArray[np.uint8]:
    """The middle of a picture, transparency laid over white.

    Args:
        picture: RGB or RGBA.
        name: what messages call it.

    Returns:
        uint8 (1024, 1024, 3).

    Raises:
        UsageError: one side is more than 50 times as long as the other.
    """
    check_aspect(picture.width / picture.height, name, MOST_ASPECT)
    return np.asarray(crop_and_resize(flattened(picture), SIDE, SIDE))


def siglip_patches(square: NDArray[np.uint8], side: int, patch: int) -> NDArray[np.float32]:
    """As ``SiglipImageProcessor`` of SigLIP 2 makes them: resized in 8 bits.

    Args:
        square: uint8 (H, W, 3).
        side: of what the encoder sees, in pixels.
        patch: of one of its patches.

    Returns:
        float32 (patches, 3 * patch * patch): channels, rows, columns.
    """
    resized = resize_as_torchvision(square, side, side, "bilinear")
    return _patches(normalized(resized, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), patch)


def dino_patches(square: NDArray[np.uint8], side: int, patch: int) -> NDArray[np.float32]:
    """As ``DINOv3ViTImageProcessor`` makes them: resized in float32, from 0 to 1. Arguments and result as above."""
    pixels = square.astype(np.float32) * np.float32(1 / 255)
    rows = np.tensordot(mixing(pixels.shape[1], side), pixels, (1, 1)).swapaxes(0, 1)
    resized = np.tensordot(mixing(pixels.shape[0], side), rows, (1, 0))
    return _patches((resized - IMAGENET_MEAN) / IMAGENET_STD, patch)


def _patches(pixels: NDArray[np.float32], patch: int) -> NDArray[np.float32]:
    rows, columns = (side // patch for side in pixels.shape[:2])
    cut = pixels.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(cut.reshape(rows * columns, -1), np.float32)
