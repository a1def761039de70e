"""Pixels: from the VAE's range to pictures, and pictures to files."""

from __future__ import annotations

import errno
import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import OutputError, UsageError
from zimgkit.engines.files import replacing
from zimgkit.runtime.pictures.metadata import Record, embedded

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""A file's ending -> its format as Pillow names it."""
QUALITY: dict[str, dict[str, Any]] = {"PNG": {}, "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}


def from_vae(decoded: NDArray[np.float32]) -> NDArray[np.float32]:
    """The VAE decoder's output as pixels, as diffusers' ``VaeImageProcessor.postprocess`` gives with ``"np"``.

    Args:
        decoded: (N, 3 or 4, H, W), -1 is black and 1 is white; what lies beyond is cut.

    Returns:
        (N, H, W, 3 or 4) from 0 to 1.
    """
    half = np.float32(0.5)
    pixels: NDArray[np.float32] = np.clip(decoded * half + half, 0, 1)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def to_pil(pixels: NDArray[np.float32]) -> list[Image]:
    """Pixels (N, H, W, 3 or 4) from 0 to 1 as 8-bit pictures, rounded half to even as diffusers does."""
    from PIL import Image

    return [Image.fromarray(picture) for picture in (pixels * np.float32(255)).round().astype(np.uint8)]


def check_target(path: Path, *, transparent: bool = False) -> str:
    """Check that a picture can be saved there, before any time is spent on it; returns its format.

    Raises:
        UsageError: the ending names no format, or one without transparency where the picture has it.
        OutputError: the folder does not exist or cannot be written to, or a folder lies there.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path} names no format zimgkit writes", f"end it with {', '.join(FORMATS)}")
    if transparent and FORMATS[path.suffix.lower()] == "JPEG":
        raise UsageError(f"{path}: JPEG holds no transparency", "end it with .png or .webp")
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist", "make it first")
    if path.is_dir():
        raise OutputError(f"{path} is a folder", "name a file")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"the folder {path.parent} cannot be written to", "name another, or check its rights")
    return FORMATS[path.suffix.lower()]


def encoded(image: Image, kind: str, parameters: Record | None = None, quality: int | None = None) -> bytes:
    """A picture as the bytes of a file.

    Args:
        image: the picture.
        kind: ``"PNG"``, ``"JPEG"`` or ``"WEBP"``.
        parameters: what made it, written into the file; see :func:`zimgkit.runtime.pictures.metadata.embedded`.
        quality: of JPEG and WebP, from 0 to 100.

    Raises:
        OSError, ValueError: the format cannot hold it.
    """
    data, options = BytesIO(), QUALITY[kind] | ({"quality": quality} if quality is not None and kind != "PNG" else {})
    image.save(data, kind, **options, **(embedded(parameters, kind) if parameters else {}))
    return data.getvalue()


def save(image: Image, path: Path, parameters: Record | None = None) -> None:
    """Write a picture in the format its file's ending names: PNG, JPEG or WebP. The file is whole or absent.

    Args:
        image: the picture.
        path: the file; one that exists is replaced.
        parameters: what made it, written into the file; see :func:`zimgkit.runtime.pictures.metadata.embedded`.

    Raises:
        UsageError: the ending names no format.
        OutputError: the folder does not exist or cannot be written to, the disk is full, or the format cannot hold a
            picture of this size.
    """
    kind = check_target(path)
    try:
        data = encoded(image, kind, parameters)
    except (OSError, ValueError) as error:
        width, height = image.size
        raise OutputError(f"{path}: {kind} cannot hold this {width}x{height} picture ({error})", "use .png") from None
    try:
        with replacing(path) as part:
            part.write_bytes(data)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space, or name a folder on another disk" if full else "check the path and its rights"
        raise OutputError(f"{path} cannot be written ({error.strerror})", hint) from None
