"""Arrays that took long to compute, kept on disk between runs: bounded, checked, and read memory-mapped.

An entry is a ``.npy`` file with the CRC-32 of all that comes before it as its last four bytes, little-endian.
"""

from __future__ import annotations

import contextlib
import math
import os
import reprlib
import secrets
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from platformdirs import user_cache_path

from zimgkit.engines.errors import UsageError

LIMIT_VARIABLE = "ZIMG_CACHE_LIMIT"
"""The environment variable that bounds the entries of each kind, in bytes; 0 switches the cache off."""

DEFAULT_LIMIT = 2 << 30
MAX_DIGITS = 20
CHECKSUM_SIZE = 4
CHUNK = 1 << 20


def cached_array(
    kind: str, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], fill: Callable[[NDArray[Any]], None]
) -> NDArray[Any]:
    """Give an array from the cache, or compute it and keep it there.

    An entry that is damaged is computed again. Where the cache cannot be written, or its limit is smaller than
    the array, the array is computed in memory. The entries used least recently make room for new ones.

    Args:
        kind: the subfolder of the user's cache folder (``~/.cache/zimgkit`` on Linux).
        key: names the array's content, such as a hash of all that it follows from; a plain file name.
        shape: the array's sides.
        dtype: its element type.
        fill: writes the whole of the array it is given.

    Returns:
        The array, read-only, memory-mapped where possible.

    Raises:
        UsageError: ``ZIMG_CACHE_LIMIT`` is not a number of bytes.
    """
    limit = cache_limit()
    folder = user_cache_path("zimgkit") / kind
    path = folder / f"{key}.npy"
    found = _load(path, shape, dtype)
    if found is not None:
        return found
    part = folder / f"{key}.{secrets.token_hex(4)}.part"
    fits = math.prod(shape) * dtype.itemsize <= limit
    mapped = _allocate(part, shape, dtype) if fits else None
    array = np.empty(shape, dtype) if mapped is None else mapped
    try:
        fill(array)
        # The array stays mapped whatever becomes of its file: a failure from here on costs only the entry.
        with contextlib.suppress(OSError):
            if mapped is not None:
                mapped.flush()
                _seal(part)
                part.replace(path)
                make_room(folder, limit)
    finally:
        if mapped is not None:
            part.unlink(missing_ok=True)
    array.flags.writeable = False
    return array


def cache_limit() -> int:
    """How many bytes the entries of one kind may take.

    Raises:
        UsageError: ``ZIMG_CACHE_LIMIT`` is not a number of bytes.
    """
    text = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT))
    if not (text.isascii() and text.isdecimal() and len(text) < MAX_DIGITS):
        raise UsageError(f"{LIMIT_VARIABLE} is {reprlib.repr(text)}", "give a number of bytes, such as 2147483648")
    return int(text)


def _load(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any] | None:
    try:
        with path.open("rb") as file:
            if _checksum(file) != file.read():
                return None
        array = open_memmap(path, mode="r")
        os.utime(path)  # used now, in the eyes of make_room
    except (OSError, ValueError):
        return None
    return array if (array.shape, array.dtype) == (shape, dtype) else None


def _allocate(part: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.memmap[Any, Any] | None:
    """Begin an entry, with all of its space taken; None where it cannot be written."""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        array = open_memmap(part, "w+", dtype, shape)
        # Writing to a mapped file on a full disk kills the process, so the disk must be full now or never.
        with part.open("r+b") as file:
            _reserve(file, array.offset, part.stat().st_size + CHECKSUM_SIZE)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        return None
    return array


def _reserve(file: BinaryIO, start: int, end: int) -> None:
    """Take the space of a file on the disk; what lies before ``start`` is written already."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, end)
        return
    file.seek(start)  # macOS and Windows have no such call: what is written has its space.
    for position in range(start, end, CHUNK):
        file.write(bytes(min(CHUNK, end - position)))


def sealed(data: bytes) -> bytes:
    """Bytes with the checksum behind them that the entries have."""
    return data + zlib.crc32(data).to_bytes(CHECKSUM_SIZE, "little")


def unsealed(data: bytes) -> bytes:
    """Bytes without their checksum.

    Raises:
        ValueError: it is not theirs.
    """
    content = data[:-CHECKSUM_SIZE]
    if sealed(content) != data:
        raise ValueError("damaged")
    return content


def _seal(part: Path) -> None:
    with part.open("r+b") as file:
        checksum = _checksum(file)
        file.write(checksum)


def _checksum(file: BinaryIO) -> bytes:
    """Read an entry up to its last four bytes, and give what these should be."""
    left = os.fstat(file.fileno()).st_size - CHECKSUM_SIZE
    value = 0
    while left > 0 and (chunk := file.read(min(left, CHUNK))):
        value = zlib.crc32(chunk, value)
        left -= len(chunk)
    return value.to_bytes(CHECKSUM_SIZE, "little")


def make_room(folder: Path, limit: int) -> None:
    """Remove the files used least recently, unfinished ones of dead processes among them, until the rest fit.

    Args:
        folder: of the entries of one kind.
        limit: how many bytes they may take.
    """
    entries = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # Another process makes room as well.
            entries.append((path.lstat(), path))
    total = 0
    for state, path in sorted(entries, key=lambda entry: -entry[0].st_mtime_ns):
        total += state.st_size
        if total > limit and not stat.S_ISDIR(state.st_mode):
            path.unlink(missing_ok=True)
