"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def beside(target: Path, ending: str) -> Path:
    """A new hidden name in the same folder: what lies there moves to ``target`` in one step."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{ending}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write; at the end it takes the place of ``path``, or where that fails, is gone.

    It is on the disk before it takes that place, so that a power cut leaves the old file or the new one.

    Raises:
        OSError: the file that was written cannot be moved.
    """
    part = beside(path, "part")
    try:
        yield part
        flush(part)
        part.replace(path)
        flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: else a rename may survive a power cut, and the bytes not.

    Where the file system knows no such thing, nothing is done.

    Raises:
        OSError: the disk failed.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(file)
