"""One writer at a time for each bundle."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from platformdirs import user_cache_path

from zimgkit.engines.errors import OutputError


@contextlib.contextmanager
def only_writer_of(out: Path) -> Iterator[None]:
    """Hold the lock of a bundle's folder, and clear what a killed build of it left behind.

    Raises:
        OutputError: another process holds it.
    """
    from filelock import FileLock, Timeout

    key = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:32]
    path = user_cache_path("zimgkit") / "locks" / f"{key}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(f"another process is writing {out}", "wait for it, or name another folder") from None
    try:
        for leftover in out.parent.glob(f".{out.name}.*.part"):
            shutil.rmtree(leftover, ignore_errors=True)
        for replaced in out.parent.glob(f".{out.name}.*.old"):
            # Killed between putting the old bundle aside and putting the new one in its place.
            shutil.rmtree(replaced, ignore_errors=True) if out.exists() else replaced.rename(out)
        yield
    finally:
        lock.release()
