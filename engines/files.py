"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]


def beside(target: Path, ending: str) -> Path:
    """A new hidden name in the same folder: what lies there moves to ``target`` in one step."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{ending}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give an empty file beside ``path`` to fill, which takes its place at the end; where that fails, it is gone.

    It is on the disk before it takes that place, so that a power cut leaves the old file or the new one. What a killed
    process left of the same file is removed.

    Raises:
        OSError: the file cannot be made or moved.
    """
    with _own(path, "part", Path.touch) as part:
        mode = part.stat().st_mode
        try:
            yield part
            part.chmod(mode)  # Libraries that write by way of a file of their own leave it to its owner alone.
            flush(part)
            part.replace(path)
            flush(path.parent)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(target: Path, ending: str) -> Iterator[Path]:
    """Give a new hidden folder beside ``target``, named for it; at the end it is gone.

    Those of killed processes are removed.

    Raises:
        OSError: it cannot be made.
    """
    with _own(target, ending, Path.mkdir) as folder:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _own(target: Path, ending: str, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new file or folder beside ``target``, locked as long as its owner lives: by that others know who is dead."""
    _clear(target, ending)
    while True:
        path = beside(target, ending)
        make(path)
        try:
            lock = acquire(path)
        except FileNotFoundError:  # Taken for a dead one's before it was locked.
            continue
        except OSError:
            lock = -1  # A file system without locks, where leftovers stay.
        if lock is not None:
            break
    try:
        yield path
    finally:
        if lock >= 0:
            os.close(lock)


def _clear(target: Path, ending: str) -> None:
    """Remove what processes that are dead made beside a target."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.{ending}")
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if name.fullmatch(entry.name):
                _remove_dead(Path(entry.path))


def _remove_dead(path: Path) -> None:
    with contextlib.suppress(OSError):
        lock = acquire(path)
        if lock is not None:
            try:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
            finally:
                os.close(lock)


def acquire(path: Path) -> int | None:
    """Lock a file or folder that is there until what is returned is closed, or the process dies.

    Returns:
        The open file; None where another process has the lock, or has just removed what it is of.

    Raises:
        OSError: it cannot be opened, or its system knows no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "no locks of files")
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        file = os.open(path, os.O_RDWR | flags)  # NFS locks only what may be written.
    except (IsADirectoryError, PermissionError):
        file = os.open(path, os.O_RDONLY | flags)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: else a rename may survive a power cut, and the bytes not.

    Where the file system knows no such thing, nothing is done.

    Raises:
        OSError: the disk failed.
    """
    if os.name == "nt":
        return  # It opens no folders, and syncs no file that is open for reading alone.
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(file)
