"""Checkpoint tensors to bundle tensors: linked where nothing changes, else streamed piece by piece.

Weights never pass through PyTorch, and no more than a piece of one tensor is in memory at a time; of what LoRAs touch,
which is merged on its way and lies in a file of its own, no more than one tensor.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zimg.engines.dtypes import BY_NAME, float32_to_bfloat16, to_float32
from zimg.engines.safetensors import TensorInfo, write
from zimg.export.layout import base_name, lora_name, weights_name
from zimg.export.lora.deltas import Addend, Matrix, merged

if TYPE_CHECKING:
    from zimg.export.parts import Transform

PIECE = 16 << 20
"""Elements read at a time: 64 MiB of float32."""
MERGED_PIECE = 1 << 18
"""Elements of rows merged at a time, so many that they stay in a processor's cache."""


@dataclass(frozen=True)
class Wanted:
    """One parameter of the bundle: the tensor it comes from, its shape, and what is done to its values."""

    source: TensorInfo
    shape: tuple[int, ...]
    transform: Transform | None = None
    addends: tuple[Addend, ...] = ()
    """What LoRAs add to it."""

    def is_kept(self, precision: str) -> bool:
        """Whether the tensor can stay as it is, where it is."""
        aligned = self.source.offset % BY_NAME[precision].storage.itemsize == 0
        return self.transform is None and not self.addends and self.source.dtype == precision and aligned


def export_weights(
    wanted: Mapping[str, Mapping[str, Wanted]],
    precision: str,
    folder: Path,
    report: Callable[[int, int], None] = lambda done, total: None,
    *,
    keep_base: bool = False,
) -> dict[str, dict[str, TensorInfo]]:
    """Bring all parameters of a bundle into its folder.

    Args:
        wanted: component -> parameter -> what it comes from.
        precision: the element type of the bundle's weights.
        folder: the bundle's folder.
        report: called with bytes written so far, and bytes to write.
        keep_base: bring what LoRAs touch without them as well, as the checkpoint has it.

    Returns:
        component -> parameter -> where it lies in the bundle. ``TensorInfo.name`` is the name in the checkpoint.

    Raises:
        OSError: the disk is full or a file cannot be written.
    """
    linked = _link_unchanged(wanted, precision, folder, keep_base=keep_base)
    placed: dict[str, dict[str, TensorInfo]] = {}
    files: dict[str, dict[str, Wanted]] = defaultdict(dict)
    for component, wants in wanted.items():
        placed[component] = {}
        for name, want in wants.items():
            is_linked = want.source.file in linked
            if want.addends:
                files[lora_name(component)][name] = want
                if keep_base and not is_linked:
                    files[base_name(component)][name] = replace(want, addends=())
            elif is_linked:
                placed[component][name] = replace(want.source, file=linked[want.source.file])
            else:
                files[weights_name(component)][name] = want
    bases = {base_name(component) for component in wanted}
    jobs = {
        file: {name: (want, want.source.dtype if file in bases else precision) for name, want in wants.items()}
        for file, wants in files.items()
    }
    total = sum(written_bytes(want, dtype) for job in jobs.values() for want, dtype in job.values())
    progress = Progress(total, report)
    for file, job in jobs.items():
        written = write_wanted(folder / file, job, progress)
        if file not in bases:
            placed[file.partition(".")[0]] |= {name: written[want.source.name] for name, (want, _) in job.items()}
    return placed


class Progress:
    """Counts bytes on their way."""

    def __init__(self, total: int, report: Callable[[int, int], None]) -> None:
        self._done, self._total, self._report = 0, total, report

    def count(self, pieces: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
        """Hand pieces on, and report each."""
        for piece in pieces:
            yield piece
            self._done += piece.nbytes
            self._report(self._done, self._total)


def write_wanted(path: Path, wants: Mapping[str, tuple[Wanted, str]], progress: Progress) -> dict[str, TensorInfo]:
    """Write parameters, each in its element type, into one file under their names in the checkpoint."""
    return write(
        path,
        {want.source.name: (dtype, want.shape) for want, dtype in wants.values()},
        {want.source.name: progress.count(pieces(want, dtype)) for want, dtype in wants.values()},
        {"format": "pt"},
    )


def linkable(
    wanted: Mapping[str, Mapping[str, Wanted]], precision: str, *, keep_base: bool = False
) -> dict[Path, bool]:
    """The files that the tensors come from, and whether each can be linked: all that is wanted of it stays as it is."""
    found: dict[Path, bool] = {}
    for wants in wanted.values():
        for want in wants.values():
            plain = replace(want, addends=()) if keep_base else want
            found[want.source.file] = found.get(want.source.file, True) and plain.is_kept(precision)
    return found


def _link_unchanged(
    wanted: Mapping[str, Mapping[str, Wanted]], precision: str, folder: Path, *, keep_base: bool
) -> dict[Path, Path]:
    """Hard-link the files of which every wanted tensor stays as it is; map them to their links.

    A link needs no space, and stays whole when the checkpoint is deleted. It has the checkpoint's own path, so that a
    bundle and its checkpoint can share a folder.
    """
    linked = {}
    for file, may in linkable(wanted, precision, keep_base=keep_base).items():
        if may:
            target = folder / file.parent.name / file.name
            try:
                target.parent.mkdir(exist_ok=True)
                os.link(file.resolve(), target)
            except OSError:
                with contextlib.suppress(OSError):
                    target.parent.rmdir()  # Where it is empty.
                continue  # On another disk, or not ours to link: its tensors are copied.
            linked[file] = target
    return linked


def written_bytes(want: Wanted, precision: str) -> int:
    """How many bytes a streamed parameter takes."""
    return int(np.prod(want.shape, dtype=np.int64)) * BY_NAME[precision].storage.itemsize


def pieces(want: Wanted, precision: str) -> Iterator[NDArray[Any]]:
    """The bytes of one parameter, in order."""
    info = want.source
    if want.transform is not None:
        stored = np.concatenate([*read_pieces(info)]).reshape(info.shape)
        values = want.transform(to_float32(stored, info.dtype))
        yield _cast(np.ascontiguousarray(values).reshape(-1), "float32", precision)
        return
    if want.addends:
        yield from _merged_pieces(want, precision)
        return
    for piece in read_pieces(info):
        yield _cast(piece, info.dtype, precision)


def _merged_pieces(want: Wanted, precision: str) -> Iterator[NDArray[Any]]:
    """The same of a matrix that LoRAs change, on all cores."""
    rows, width = want.shape
    step = max(1, MERGED_PIECE // width)
    bounds = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    values = merged(partial(_read_rows, want.source), bounds, want.addends)

    def piece(ends: tuple[int, int]) -> NDArray[Any]:
        return _cast(values(*ends).reshape(-1), "float32", precision)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(piece, bounds)


def _read_rows(info: TensorInfo, start: int, stop: int) -> Matrix:
    """Some rows of a matrix in float32."""
    storage, width = BY_NAME[info.dtype].storage, info.shape[1]
    offset = info.offset + start * width * storage.itemsize
    piece = np.fromfile(info.file, storage, (stop - start) * width, offset=offset)
    if piece.size < (stop - start) * width:
        raise OSError(f"{info.file} ended early")
    return to_float32(piece, info.dtype).reshape(-1, width)


def read_pieces(info: TensorInfo) -> Iterator[NDArray[Any]]:
    """A tensor in flat pieces. Read, not mapped, so that what was read does not stay resident."""
    storage = BY_NAME[info.dtype].storage
    with info.file.open("rb") as file:
        file.seek(info.offset)
        remaining = info.nbytes // storage.itemsize
        while remaining:
            piece = np.fromfile(file, storage, min(PIECE, remaining))
            if not piece.size:
                raise OSError(f"{info.file} ended early")
            remaining -= piece.size
            yield piece


def _cast(piece: NDArray[Any], stored: str, precision: str) -> NDArray[Any]:
    if stored == precision:
        return piece
    values = to_float32(piece, stored)
    return float32_to_bfloat16(values) if precision == "bfloat16" else values
