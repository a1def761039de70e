"""A dataset: a folder with pictures and a table (``image,prompt``, and what a task takes beside), and its batches.

Pictures are trained at the size they have, or at most so many pixels; those of one size make up a bucket, and a batch
comes from one bucket.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from zimgkit.training.metadata import NAMES, DatasetError, find_table, read_table
from zimgkit.training.pictures import open_picture

METADATA = NAMES[0]
IMAGE, PROMPT = "image", "prompt"
MULTIPLE = 16
"""Sides are multiples of this: the autoencoder makes 8 pixels one, and the transformer takes patches of 2."""

Size = tuple[int, int]
"""Height and width of a picture, in pixels."""
Bucket = TypeVar("Bucket")
"""What the rows that may share a batch have in common."""

__all__ = ["METADATA", "Dataset", "DatasetError", "Row", "Size", "draw_batch", "load_pictures", "read_dataset"]


@dataclass(frozen=True)
class Row:
    """One line of the metadata."""

    image: Path
    prompt: str
    size: Size
    """The image is trained at it."""
    where: str = ""
    """Table and line, for errors."""
    pictures: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    """Column -> the files that it names, without the image."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Column -> what else is asked for, as the table has it."""


@dataclass(frozen=True)
class Dataset:
    """A dataset whose every row was checked. Use :func:`read_dataset`."""

    root: Path
    rows: tuple[Row, ...]
    sizes: Mapping[Path, Size]
    """Of all pictures, as they are trained on."""

    def buckets(self) -> dict[Size, Tensor]:
        """Size -> indexes of the rows that have it, int64; sizes in rising order."""
        found: dict[Size, list[int]] = {}
        for index, row in enumerate(self.rows):
            found.setdefault(row.size, []).append(index)
        return {size: torch.tensor(found[size]) for size in sorted(found)}

    def load(self, pictures: Sequence[Path]) -> Tensor:
        """Pictures of one size: float32 (n, 3, height, width), -1 to 1.

        Raises:
            DatasetError: one cannot be decoded.
        """
        return load_pictures(pictures, self.sizes[pictures[0]])


def read_dataset(
    root: Path,
    *,
    table: Path | None = None,
    files: Collection[str] = (IMAGE,),
    extras: Collection[str] = (),
    max_pixels: int | None = None,
) -> Dataset:
    """Read a dataset's metadata and check every row, the headers of its pictures among it.

    Args:
        root: the folder that pictures are named relative to.
        table: by default the one in the folder.
        files: columns that name pictures (``--data_file_keys``), the image among them.
        extras: columns that are asked for beside image and prompt (``--extra_inputs``).
        max_pixels: pictures with more are reduced to so many, and cropped to multiples of 16; where it is None,
            all must be of such sizes.

    Raises:
        DatasetError: naming the file and the line: no metadata, no such columns, a broken row, an empty caption, a
            picture that is missing, unreadable, outside the folder, or of a size that cannot be trained on.
    """
    path = table or find_table(root)
    columns = tuple(dict.fromkeys((IMAGE, PROMPT, *extras)))
    sizes: dict[Path, Size] = {}
    rows = [_row(root, where, values, columns, files, max_pixels, sizes) for where, values in read_table(path, columns)]
    return Dataset(root, tuple(rows), sizes)


def _row(
    root: Path,
    where: str,
    values: Mapping[str, Any],
    columns: Sequence[str],
    files: Collection[str],
    max_pixels: int | None,
    sizes: dict[Path, Size],
) -> Row:
    prompt = values[PROMPT]
    if not isinstance(prompt, str) or not prompt.strip():
        raise DatasetError(f"{where}: the caption of {values[IMAGE]} is empty", "write what the picture shows")
    pictures: dict[str, tuple[Path, ...]] = {}
    for column in (name for name in columns if name in {IMAGE, *files}):
        named = values[column] if isinstance(values[column], list) else [values[column]]
        pictures[column] = tuple(_picture(root, name, where) for name in named)
        for picture in pictures[column]:
            if picture not in sizes:
                sizes[picture] = _size(picture, where, max_pixels)
    if len(pictures[IMAGE]) != 1:
        raise DatasetError(f"{where}: {len(pictures[IMAGE])} images are named", "name one")
    (image,) = pictures.pop(IMAGE)
    others = {name: values[name] for name in columns if name not in {IMAGE, PROMPT, *pictures}}
    return Row(image, prompt.strip(), sizes[image], where, pictures, others)


def _picture(root: Path, name: Any, where: str) -> Path:
    name = name.strip() if isinstance(name, str) else ""
    relative = PurePosixPath(name)
    if not name or relative.is_absolute() or ".." in relative.parts or "\\" in name:
        raise DatasetError(f"{where}: {name!r} is no picture in the dataset's folder", f"name it relative to {root}")
    return root / relative


def _size(image: Path, where: str, max_pixels: int | None) -> Size:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(image) as picture:
            width, height = picture.size
    except FileNotFoundError:
        raise DatasetError(f"{where}: {image} is missing", "add the picture, or take the line out") from None
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{where}: {image} is no picture that can be read ({error})", "replace it") from None
    cropped = width // MULTIPLE * MULTIPLE or MULTIPLE, height // MULTIPLE * MULTIPLE or MULTIPLE
    if max_pixels is None and cropped != (width, height):
        raise DatasetError(
            f"{where}: {image} is {width}x{height}",
            f"both sides must be multiples of {MULTIPLE}: crop it to {cropped[0]}x{cropped[1]}",
        )
    return fitting(height, width, max_pixels) if max_pixels else (height, width)


def fitting(height: int, width: int, max_pixels: int) -> Size:
    """The size that a picture is trained at, as ``ImageCropAndResize`` of DiffSynth-Studio has it."""
    scale = min(1.0, math.sqrt(max_pixels / (height * width)))
    rows, columns = (int(side * scale) // MULTIPLE * MULTIPLE for side in (height, width))
    return max(rows, MULTIPLE), max(columns, MULTIPLE)


def load_pictures(images: Sequence[Path], size: Size | None = None) -> Tensor:
    """Pictures of one size as float32 (n, 3, height, width), -1 to 1.

    Args:
        images: their files.
        size: what they are scaled and cropped to, around the middle; by default they are taken as they are.

    Raises:
        DatasetError: one cannot be decoded.
    """
    from PIL import Image, ImageOps

    arrays = []
    for image in images:
        rgb = open_picture(image)
        if size and rgb.size != (size[1], size[0]):
            rgb = ImageOps.fit(rgb, (size[1], size[0]), Image.Resampling.BILINEAR)
        arrays.append(np.asarray(rgb))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_batch(buckets: Mapping[Bucket, Tensor], batch_size: int, generator: torch.Generator) -> tuple[Bucket, Tensor]:
    """A bucket, as often as there are rows in it, and so many of its rows, drawn with replacement."""
    counts = torch.tensor([float(len(rows)) for rows in buckets.values()])
    key = list(buckets)[int(torch.multinomial(counts, 1, generator=generator))]
    rows = buckets[key]
    return key, rows[torch.randint(len(rows), (batch_size,), generator=generator)]
