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
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from zimgkit.engines.errors import CheckpointError, LoraError
from zimgkit.engines.tensors.dtypes import BY_NAME, float32_to_bfloat16, to_float32
from zimgkit.engines.tensors.safetensors import TensorInfo, write
from zimgkit.export.checkpoints.stored import Decoded, Stored, row_count, row_width, tensor_rows
from zimgkit.export.weights.addends import Addend, Matrix, merged
from zimgkit.export.weights.finite import HINT, count_in_words, count_non_finite
from zimgkit.export.weights.layout import base_name, lora_name, weights_name

if TYPE_CHECKING:
    from zimgkit.export.networks.parts import Transform

PIECE = 16 << 20
"""Elements read at a time: 64 MiB of float32."""
MERGED_PIECE = 1 << 18
"""Elements of rows merged at a time, so many that they stay in a processor's cache."""

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

    source: Stored
    shape: tuple[int, ...]
    """As it is stored."""
    transform: Transform | None = None
    addends: tuple[Addend, ...] = ()
    """What LoRAs add to it."""
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
        if isinstance(self.source, Decoded):
            return False
        aligned = self.source.offset % BY_NAME[precision].storage.itemsize == 0
        plain = self.transform is None and self.encoding is None and not self.addends
        return plain and self.source.dtype == precision and aligned


def export_weights(
    wanted: Mapping[str, Mapping[str, Wanted]],
    precision: str,
    folder: Path,
    report: Callable[[int, int], None] = lambda done, total: None,
    *,
    keep_base: bool = False,
    places: Mapping[Path, str] = {},
) -> dict[str, dict[str, TensorInfo]]:
    """Bring all parameters of a bundle into its folder.

    Args:
        wanted: component -> parameter -> what it comes from.
        precision: the element type of the bundle's weights.
        folder: the bundle's folder.
        report: called with bytes written so far, and bytes to write.
        keep_base: bring what LoRAs touch without them as well, as the checkpoint has it.
        places: files -> where they are linked to, if not under their own paths in the checkpoint.

    Returns:
        component -> parameter -> where it lies in the bundle. ``TensorInfo.name`` is the name in the checkpoint, with
        its suffix where it has one.

    Raises:
        CheckpointError: a tensor that is written has NaN or Inf. Those that are linked are not read here.
        LoraError: a tensor has them with what LoRAs add.
        OSError: the disk is full or a file cannot be written.
    """
    linked = _link_unchanged(wanted, precision, folder, places, keep_base=keep_base)
    placed: dict[str, dict[str, TensorInfo]] = {}
    files: dict[str, dict[str, Wanted]] = defaultdict(dict)
    owners: dict[str, str] = {}
    for component, wants in wanted.items():
        placed[component] = {}
        for name, want in wants.items():
            is_linked = want.source.file in linked
            owners |= {lora_name(component): component, weights_name(component): component}
            if want.addends:
                files[lora_name(component)][name] = want
                if keep_base and not is_linked and not want.suffix:
                    files[base_name(component)][name] = Wanted(want.source, want.source.shape)
            elif is_linked and isinstance(want.source, TensorInfo):
                placed[component][name] = replace(want.source, file=linked[want.source.file])
            else:
                files[weights_name(component)][name] = want
    bases = {base_name(component) for component in wanted}
    jobs = {
        file: {
            name: (want, want.source.dtype if file in bases else want.dtype(precision)) for name, want in wants.items()
        }
        for file, wants in files.items()
    }
    total = sum(written_bytes(want, dtype) for job in jobs.values() for want, dtype in job.values())
    progress = Progress(total, report)
    for file, job in jobs.items():
        written = write_wanted(folder / file, job, progress)
        if file not in bases:
            placed[owners[file]] |= {name: written[want.name] for name, (want, _) in job.items()}
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
    """Write parameters, each in its element type, into one file under their names there."""
    return write(
        path,
        {want.name: (dtype, want.shape) for want, dtype in wants.values()},
        {want.name: progress.count(pieces(want, dtype)) for want, dtype in wants.values()},
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
    wanted: Mapping[str, Mapping[str, Wanted]],
    precision: str,
    folder: Path,
    places: Mapping[Path, str],
    *,
    keep_base: bool,
) -> dict[Path, Path]:
    """Hard-link the files of which every wanted tensor stays as it is; map them to their links.

    A link needs no space, and stays whole when the checkpoint is deleted. It has the checkpoint's own path, so that a
    bundle and its checkpoint can share a folder.
    """
    linked = {}
    for file, may in linkable(wanted, precision, keep_base=keep_base).items():
        if may:
            target = folder / places.get(file, f"{file.parent.name}/{file.name}")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(file.resolve(), target)
            except OSError:
                with contextlib.suppress(OSError):
                    for empty in target.relative_to(folder).parents[:-1]:
                        (folder / empty).rmdir()
                continue  # On another disk, or not ours to link: its tensors are copied.
            linked[file] = target
    return linked


def written_bytes(want: Wanted, precision: str) -> int:
    """How many bytes a streamed parameter takes."""
    return int(np.prod(want.shape, dtype=np.int64)) * BY_NAME[want.dtype(precision)].storage.itemsize


def linked_from(
    wanted: Mapping[str, Mapping[str, Wanted]], placed: Mapping[str, Mapping[str, TensorInfo]]
) -> dict[TensorInfo, TensorInfo]:
    """The tensors of a bundle that nobody has read, because their files were linked -> where they come from.

    Args:
        wanted: as :func:`export_weights` takes it.
        placed: what that returned.
    """
    pairs = ((placed[component][name], want.source) for component in wanted for name, want in wanted[component].items())
    return {
        info: source
        for info, source in pairs
        if isinstance(source, TensorInfo) and info == replace(source, file=info.file)
    }


def pieces(want: Wanted, precision: str) -> Iterator[NDArray[Any]]:
    """The bytes of one parameter, in order.

    Raises:
        CheckpointError: it has NaN or Inf, in the checkpoint or in this precision.
        LoraError: it has them with what LoRAs add.
        OSError: the file ended early.
    """
    dtype = want.dtype(precision)
    for piece in _pieces(want, precision):
        if count_non_finite(piece, dtype):
            raise _not_finite(want, dtype)
        yield piece


def _pieces(want: Wanted, precision: str) -> Iterator[NDArray[Any]]:
    info = want.source
    if want.encoding is not None:
        yield from want.encoding.make(read_rows(want))
        return
    if want.transform is not None:
        stored = np.concatenate([*read_pieces(info)]).reshape(info.shape)
        values = want.transform(to_float32(stored, info.dtype))
        yield _cast(np.ascontiguousarray(values).reshape(-1), "float32", precision)
        return
    if want.addends:
        yield from _merged_rows(want, lambda rows: _cast(rows.reshape(-1), "float32", precision))
        return
    for piece in read_pieces(info):
        yield _cast(piece, info.dtype, precision)


def read_rows(want: Wanted) -> Rows:
    """What a matrix comes from, LoRAs merged, in float32, as many whole rows at a time as make a piece.

    The errors are those of :func:`pieces`.
    """
    for rows in _rows(want):
        if count_non_finite(rows, "float32"):
            raise _not_finite(want, "float32")
        yield rows


def _rows(want: Wanted) -> Rows:
    if want.addends:
        yield from _merged_rows(want, lambda rows: rows)
        return
    width = want.source.shape[-1]
    for piece in read_pieces(want.source, max(1, PIECE // width) * width):
        yield to_float32(piece, want.source.dtype).reshape(-1, width)


def _not_finite(want: Wanted, dtype: str) -> CheckpointError:
    """Who is to blame that a tensor has NaN or Inf in this element type; all of it is read again for that."""

    def count(addends: tuple[Addend, ...], stored: str) -> int:
        plain = replace(want, addends=addends, encoding=None)
        return sum(count_non_finite(piece, stored) for piece in _pieces(plain, stored))

    source = want.source
    own = f"{source.file}: {source.name!r}"
    if found := sum(count_non_finite(piece, source.dtype) for piece in read_pieces(source)):
        return CheckpointError(f"{own} has {count_in_words(found)}", HINT)
    stored = "float32" if want.encoding else dtype
    if found := count((), stored):
        hint = "build it in float32: --precision fp32" if stored != "float32" else HINT
        return CheckpointError(f"{own} has {found:,} values that {stored} cannot hold", hint)
    for addend in want.addends:
        if found := count((addend,), stored):
            message = f"{addend.label} changes {source.name!r} to {count_in_words(found)} in {stored}"
            return LoraError(message, "give it a smaller scale, or fetch it again")
    both = " and ".join(addend.label for addend in want.addends)
    return LoraError(f"{both} together change {source.name!r} to NaN or infinities", "give them smaller scales")


def _merged_rows(want: Wanted, finish: Callable[[Matrix], NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """The rows of a matrix that LoRAs change, some at a time, merged and finished on all cores."""
    rows, width = want.source.shape
    step = max(1, MERGED_PIECE // width)
    bounds = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    with np.errstate(all="ignore"):  # What overflows is found in the result.
        values = merged(partial(_read_rows, want.source), bounds, want.addends)

    def piece(ends: tuple[int, int]) -> NDArray[Any]:
        with np.errstate(all="ignore"):
            return finish(values(*ends))

    # The products are small: threads of their own would only fight with those of the pool.
    with _blas().limit(limits=1), ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(piece, bounds)


@cache
def _blas() -> ThreadpoolController:
    """The threads that numpy multiplies matrices with."""
    return ThreadpoolController().select(user_api="blas")


def _read_rows(tensor: Stored, start: int, stop: int) -> Matrix:
    """Some rows of a matrix in float32."""
    return to_float32(tensor_rows(tensor, start, stop), tensor.dtype)


def read_pieces(info: Stored, size: int | None = None) -> Iterator[NDArray[Any]]:
    """A tensor in flat pieces of so many elements, by default :data:`PIECE`; of one that is decoded, of whole rows.

    Read, not mapped, so that what was read does not stay resident.
    """
    if isinstance(info, Decoded):
        rows, step = row_count(info.shape), max(1, (size or PIECE) // max(1, row_width(info.shape)))
        for start in range(0, rows, step):
            yield info.rows(start, min(start + step, rows)).reshape(-1)
        return
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
    with np.errstate(over="ignore"):  # Of float64; it is found in the result.
        values = to_float32(piece, stored)
    return float32_to_bfloat16(values) if precision == "bfloat16" else values
