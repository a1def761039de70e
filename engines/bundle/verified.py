"""Which files were hashed before and have not changed since: a note per file in the user's cache.

Hashing 40 GB takes half a minute; doing it once per file is enough. A file counts as unchanged while its
size, its two times and its inode are the same, as git judges its index. So it cannot see what changes none of these:
a disk that decays, a write within the clock's tick, one through a mapping whose times the system has yet to update, or
a clock that was set back. ``zimg-run inspect --verify`` reads every byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from platformdirs import user_cache_path

CHUNK = 16 << 20
Look = Callable[[Path, int, bytes], object]
"""Gets the bytes of a file that is hashed: its path, the offset of some bytes, and them."""


def state(path: Path) -> str:
    """What changes with a file's content: its size, two times and inode."""
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def is_known(path: Path, digest: str) -> bool:
    """Whether this very file was seen with this SHA-256 and has not changed since."""
    with contextlib.suppress(OSError):
        return _note(path).read_bytes() == _text(digest, state(path))
    return False


def remember(path: Path, digest: str, state: str) -> None:
    """Note that a file has this SHA-256. A cache that cannot be written is done without.

    Args:
        path: the file.
        digest: of all its bytes, in hexadecimal.
        state: the file's :func:`state` before its bytes were read.
    """
    with contextlib.suppress(OSError):
        note = _note(path)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_bytes(_text(digest, state))


def _note(path: Path) -> Path:
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return user_cache_path("zimgkit") / "verified" / key


def _text(digest: str, state: str) -> bytes:
    return f"{digest} {state}".encode()


def sha256(path: Path, look: Look | None = None) -> str:
    """The SHA-256 of a file, read in chunks.

    Args:
        path: the file.
        look: called with every chunk, of :data:`CHUNK` bytes but for the last.
    """
    digest, offset = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            if look is not None:
                look(path, offset, chunk)
            offset += len(chunk)
    return digest.hexdigest()


def hashes(paths: Iterable[Path], report: Callable[[int], None]) -> Generator[str | OSError, None, None]:
    """The SHA-256 of files, or why one cannot be read, in their order; several are read at once.

    Where no more are asked for, reading stops.

    Args:
        paths: the files.
        report: called with how many bytes of all are done, from the threads that read.
    """
    lock, stopped, done = threading.Lock(), threading.Event(), 0

    def advance(_: Path, __: int, chunk: bytes) -> None:
        nonlocal done
        if stopped.is_set():
            raise OSError
        with lock:
            done += len(chunk)
            report(done)

    def digest(path: Path) -> str | OSError:
        try:
            return sha256(path, advance)
        except OSError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            yield from pool.map(digest, paths)
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
