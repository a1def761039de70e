"""A dataset: a folder with pictures and ``metadata.csv`` (``image,prompt``), and how batches are drawn from it.

Pictures are trained at the size they have; those of one size make up a bucket, and a batch comes from one bucket.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from zimgkit.engines.errors import ZimgError

METADATA = "metadata.csv"
COLUMNS = ("image", "prompt")
MULTIPLE = 16
"""Sides are multiples of this: the autoencoder makes 8 pixels one, and the transformer takes patches of 2."""

Size = tuple[int, int]
"""Height and width of a picture, in pixels."""
Bucket = TypeVar("Bucket")
"""What the rows that may share a batch have in common."""


class DatasetError(ZimgError):
    """A dataset is missing, broken, or holds what cannot be trained on."""


@dataclass(frozen=True)
class Row:
    """One line of the metadata."""

    image: Path
    prompt: str
    size: Size


@dataclass(frozen=True)
class Dataset:
    """A dataset whose every row was checked. Use :func:`read_dataset`."""

    root: Path
    rows: tuple[Row, ...]

    def buckets(self) -> dict[Size, Tensor]:
        """Size -> indexes of the rows that have it, int64; sizes in rising order."""
        found: dict[Size, list[int]] = {}
        for index, row in enumerate(self.rows):
            found.setdefault(row.size, []).append(index)
        return {size: torch.tensor(found[size]) for size in sorted(found)}


def read_dataset(root: Path) -> Dataset:
    """Read a dataset's metadata and check every row, its picture's header among it.

    Raises:
        DatasetError: naming the file and the line: no metadata, no such columns, a broken row, an empty caption, a
            picture that is missing, unreadable, outside the folder, or of a size that cannot be trained on.
    """
    path = root / METADATA
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing", f"a dataset is a folder with one ({','.join(COLUMNS)})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read ({error})", "it should be a text file in UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    sizes: dict[Path, Size] = {}
    try:
        header = next(reader, [])
        if not set(COLUMNS) <= set(header):
            raise DatasetError(f"{path} has the columns {','.join(header) or 'none'}", f"name them {','.join(COLUMNS)}")
        columns = [header.index(name) for name in COLUMNS]
        for fields in reader:
            if fields:
                where = f"{path}, line {reader.line_num}"
                rows.append(_row(root, where, fields, len(header), columns, sizes))
    except csv.Error as error:
        raise DatasetError(f"{path}, line {reader.line_num}: broken row ({error})", "check its quotes") from None
    if not rows:
        raise DatasetError(f"{path} has no rows", "add a line for each picture")
    return Dataset(root, tuple(rows))


def _row(
    root: Path, where: str, fields: Sequence[str], count: int, columns: Sequence[int], sizes: dict[Path, Size]
) -> Row:
    if len(fields) != count:
        raise DatasetError(
            f"{where}: broken row, {len(fields)} fields instead of {count}", "put quotes around captions with commas"
        )
    name, prompt = (fields[column].strip() for column in columns)
    if not prompt:
        raise DatasetError(f"{where}: the caption of {name} is empty", "write what the picture shows")
    relative = PurePosixPath(name)
    if not name or relative.is_absolute() or ".." in relative.parts or "\\" in name:
        raise DatasetError(f"{where}: {name!r} is no picture in the dataset's folder", f"name it relative to {root}")
    image = root / relative
    if image not in sizes:
        sizes[image] = _size(image, where)
    return Row(image, prompt, sizes[image])


def _size(image: Path, where: str) -> Size:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(image) as picture:
            width, height = picture.size
    except FileNotFoundError:
        raise DatasetError(f"{where}: {image} is missing", "add the picture, or take the line out") from None
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{where}: {image} is no picture that can be read ({error})", "replace it") from None
    if height % MULTIPLE or width % MULTIPLE:
        raise DatasetError(
            f"{where}: {image} is {width}x{height}",
            f"both sides must be multiples of {MULTIPLE}: crop it to {width // MULTIPLE * MULTIPLE or MULTIPLE}x"
            f"{height // MULTIPLE * MULTIPLE or MULTIPLE}",
        )
    return height, width


def load_pictures(images: Sequence[Path]) -> Tensor:
    """Pictures of one size as float32 (n, 3, height, width), -1 to 1.

    Raises:
        DatasetError: one cannot be decoded.
    """
    from PIL import Image

    arrays = []
    for image in images:
        try:
            with Image.open(image) as picture:
                arrays.append(np.asarray(picture.convert("RGB")))
        except OSError as error:
            raise DatasetError(f"{image} cannot be read ({error})", "replace it") from None
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_batch(buckets: Mapping[Bucket, Tensor], batch_size: int, generator: torch.Generator) -> tuple[Bucket, Tensor]:
    """A bucket, as often as there are rows in it, and so many of its rows, drawn with replacement."""
    counts = torch.tensor([float(len(rows)) for rows in buckets.values()])
    key = list(buckets)[int(torch.multinomial(counts, 1, generator=generator))]
    rows = buckets[key]
    return key, rows[torch.randint(len(rows), (batch_size,), generator=generator)]
