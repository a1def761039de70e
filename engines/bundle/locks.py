"""One writer at a time for each bundle."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from platformdirs import user_cache_path

from zimgkit.engines.errors import OutputError
from zimgkit.engines.files import acquire

LEFT_BEHIND = r"\.{name}\.[0-9a-z_]{{8}}\.(part|float|references)"
"""Folders that a killed build leaves beside a bundle: itself, and float bundles to calibrate on or compare with."""
SET_ASIDE = r"\.{name}\.[0-9a-f]{{8}}\.old"


@contextlib.contextmanager
def only_writer_of(out: Path) -> Iterator[None]:
    """Hold the lock of a bundle's folder, and clear what a killed build of it left behind.

    The lock is a file beside the bundle, so that all users and containers that share the folder share it. Where none
    can be written there, it is one in the user's cache; where none can be there either, there is none.

    Raises:
        OutputError: another process holds it.
    """
    out = out.resolve()
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        with _locked(out):
            _clear(out)
            yield
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # Stays where a bundle is in it.


def _clear(out: Path) -> None:
    """Remove what a killed build left, and bring a bundle back that was put aside and not replaced."""
    name = re.escape(out.name)
    for path in list(out.parent.iterdir()) if out.parent.is_dir() else ():
        if re.fullmatch(LEFT_BEHIND.format(name=name), path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(SET_ASIDE.format(name=name), path.name):
            shutil.rmtree(path, ignore_errors=True) if out.exists() else path.rename(out)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    key = hashlib.sha256(os.fsencode(out)).hexdigest()[:32]
    for path in (out.with_name(f".{out.name}.lock"), user_cache_path("zimgkit") / "locks" / f"{key}.lock"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _acquire(path)
        except OSError:
            continue
        if file is None:
            raise OutputError(f"another process is writing {out}", "wait for it, or name another folder")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(file)
        return
    yield  # Where not even a lock can be written: what follows is a reading, or says itself what it cannot write.


def _acquire(path: Path) -> int | None:
    """Lock a file, which is made where it is not there; None where another process holds it.

    Raises:
        OSError: it cannot be made, or its file system knows no locks.
    """
    while True:
        try:
            file = acquire(path)
        except FileNotFoundError:
            path.touch()
            continue
        # Who held it may just have removed it: then there is a new one to lock.
        if file is not None or path.exists():
            return file
