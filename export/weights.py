"""Checkpoint tensors to bundle tensors: linked where nothing changes, else streamed piece by piece.

Weights never pass through PyTorch, and no more than a piece of one tensor is in memory at a time.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimg.engines.dtypes import BY_NAME, float32_to_bfloat16, to_float32
from zimg.engines.safetensors import TensorInfo, write
from zimg.export.parts import Transform

PIECE = 16 << 20
"""Elements read at a time: 64 MiB of float32."""

Rows = Iterator[NDArray[np.float32]]
"""A matrix (out, in), some rows at a time."""


@dataclass(frozen=True)
class Encoding:
    """How a matrix becomes a tensor of another element type than the bundle's."""

    dtype: str
    """As safetensors have it."""
    make: Callable[[Rows], Iterator[NDArray[Any]]]
    """From the rows in float32 to the arrays that are stored one after the other. It need not read them."""


@dataclass(frozen=True)
class Wanted:
    """One tensor of the bundle: the tensor it comes from, its shape, and what is done to its values."""

    source: TensorInfo
    shape: tuple[int, ...]
    """As it is stored."""
    transform: Transform | None = None
    encoding: Encoding | None = None
    suffix: str = ""
    """What its name has more than that of its source."""

    @property
    def name(self) -> str:
        """Its name in the bundle's weight files."""
        return self.source.name + self.suffix

    def dtype(self, precision: str) -> str:
        """The element type it is stored in, in a bundle of this precision."""
        return self.encoding.dtype if self.encoding else precision

    def is_kept(self, precision: str) -> bool:
        """Whether the tensor can stay as it is, where it is."""
        aligned = self.source.offset % BY_NAME[precision].storage.itemsize == 0
        return self.transform is None and self.encoding is None and self.source.dtype == precision and aligned


def export_weights(
    wanted: Mapping[str, Mapping[str, Wanted]],
    precision: str,
    folder: Path,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, TensorInfo]]:
    """Bring all parameters of a bundle into its folder.

    Args:
        wanted: component -> parameter -> what it comes from.
        precision: the element type of the bundle's weights.
        folder: the bundle's folder.
        report: called with bytes written so far, and bytes to write.

    Returns:
        component -> parameter -> where it lies in the bundle. ``TensorInfo.name`` is the name in the checkpoint, with
        its suffix where it has one.

    Raises:
        OSError: the disk is full or a file cannot be written.
    """
    linked = _link_unchanged(wanted, precision, folder)
    streamed = {
        component: {name: want for name, want in wants.items() if want.source.file not in linked}
        for component, wants in wanted.items()
    }
    total = sum(written_bytes(want, precision) for wants in streamed.values() for want in wants.values())
    done = 0

    def count(pieces: Iterator[NDArray[Any]]) -> Iterator[NDArray[Any]]:
        nonlocal done
        for piece in pieces:
            yield piece
            done += piece.nbytes
            report(done, total)

    placed: dict[str, dict[str, TensorInfo]] = {}
    for component, wants in wanted.items():
        kept = {
            name: replace(want.source, file=linked[want.source.file])
            for name, want in wants.items()
            if want.source.file in linked
        }
        placed[component] = kept
        if own := streamed[component]:
            written = write(
                folder / f"{component}.safetensors",
                {want.name: (want.dtype(precision), want.shape) for want in own.values()},
                {want.name: count(pieces(want, precision)) for want in own.values()},
                {"format": "pt"},
            )
            placed[component] = kept | {name: written[want.name] for name, want in own.items()}
    return placed


def _link_unchanged(wanted: Mapping[str, Mapping[str, Wanted]], precision: str, folder: Path) -> dict[Path, Path]:
    """Hard-link the files of which every wanted tensor stays as it is; map them to their links.

    A link needs no space, and stays whole when the checkpoint is deleted.
    """
    users: dict[Path, list[tuple[str, Wanted]]] = defaultdict(list)
    for component, wants in wanted.items():
        for want in wants.values():
            users[want.source.file].append((component, want))
    linked = {}
    for file, uses in users.items():
        if all(want.is_kept(precision) for _, want in uses):
            target = folder / _linked_name(file)
            try:
                os.link(file.resolve(), target)
            except OSError:
                continue  # On another disk, or not ours to link: its tensors are copied.
            linked[file] = target
    return linked


def _linked_name(file: Path) -> str:
    shard = re.search(r"-\d+-of-\d+(?=\.safetensors$)", file.name)
    return f"{file.parent.name}{shard[0] if shard else ''}.linked.safetensors"


def written_bytes(want: Wanted, precision: str) -> int:
    """How many bytes a streamed parameter takes."""
    return int(np.prod(want.shape, dtype=np.int64)) * BY_NAME[want.dtype(precision)].storage.itemsize


def pieces(want: Wanted, precision: str) -> Iterator[NDArray[Any]]:
    """The bytes of one parameter, in order."""
    info = want.source
    if want.encoding is not None:
        yield from want.encoding.make(read_rows(info))
        return
    if want.transform is not None:
        stored = np.concatenate([*read_pieces(info)]).reshape(info.shape)
        values = want.transform(to_float32(stored, info.dtype))
        yield _cast(np.ascontiguousarray(values).reshape(-1), "float32", precision)
        return
    for piece in read_pieces(info):
        yield _cast(piece, info.dtype, precision)


def read_rows(info: TensorInfo) -> Rows:
    """A matrix in float32, as many whole rows at a time as make a piece."""
    width = info.shape[-1]
    for piece in read_pieces(info, max(1, PIECE // width) * width):
        yield to_float32(piece, info.dtype).reshape(-1, width)


def read_pieces(info: TensorInfo, size: int | None = None) -> Iterator[NDArray[Any]]:
    """A tensor in flat pieces of so many elements, by default :data:`PIECE`.

    Read, not mapped, so that what was read does not stay resident.
    """
    storage = BY_NAME[info.dtype].storage
    with info.file.open("rb") as file:
        file.seek(info.offset)
        remaining = info.nbytes // storage.itemsize
        while remaining:
            piece = np.fromfile(file, storage, min(size or PIECE, remaining))
            if not piece.size:
                raise OSError(f"{info.file} ended early")
            remaining -= piece.size
            yield piece


def _cast(piece: NDArray[Any], stored: str, precision: str) -> NDArray[Any]:
    if stored == precision:
        return piece
    values = to_float32(piece, stored)
    return float32_to_bfloat16(values) if precision == "bfloat16" else values
