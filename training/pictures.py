"""A dataset's pictures as they are read from their files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from zimgkit.training.metadata import DatasetError

if TYPE_CHECKING:
    from PIL.Image import Image


def open_picture(path: Path) -> Image:
    """A picture, RGB.

    Raises:
        DatasetError: it cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path} cannot be read ({error})", "replace it") from None
