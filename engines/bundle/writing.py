"""How a bundle is written: whole or absent, with a record of every file."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec

from zimgkit.engines.bundle.manifest import MANIFEST, FileRecord, Manifest
from zimgkit.engines.bundle.verified import Look, sha256
from zimgkit.engines.errors import OutputError
from zimgkit.engines.files import beside, replacing


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write ``bundle.json`` into a bundle's folder, indented for people; one that is there is replaced in one step."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    with replacing(root / MANIFEST) as part:
        part.write_bytes(text + b"\n")


def record_files(root: Path, look: Look | None = None) -> dict[str, FileRecord]:
    """Hash every file below a folder but its manifest.

    Args:
        root: the folder.
        look: called with what is read, see :func:`sha256`, on several threads, but on one for each file.
    """
    paths = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
    paths.pop(MANIFEST, None)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(partial(sha256, look=look), paths.values())
        return {
            name: FileRecord(path.stat().st_size, digest)
            for (name, path), digest in zip(paths.items(), digests, strict=True)
        }


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False, known_by: str = MANIFEST) -> Iterator[Path]:
    """Give a new folder beside ``target`` to write into; rename it to ``target`` at the end, or leave nothing.

    Args:
        target: the folder that shall exist afterwards.
        overwrite: replace a folder that exists, if it is one of ours or empty.
        known_by: the file by which one of ours is known.

    Raises:
        OutputError: the target exists, is no bundle, or cannot be written, or the disk is full.
    """
    work = beside(target, "part")
    made: list[Path] = []
    try:
        _check_target(target, overwrite, known_by)
        made = [parent for parent in target.parents if not parent.exists()]
        work.mkdir(parents=True)
        yield work
        _check_target(target, overwrite, known_by)
        _move(work, target)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        message = f"{target} cannot be written ({error.strerror or error}{place})"
        raise OutputError(message, _write_hint(error)) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # Stays where the target is in it.


def _check_target(target: Path, overwrite: bool, known_by: str) -> None:
    if target.is_symlink():
        raise OutputError(f"{target} is a link", "name the folder itself")
    if not target.exists():
        return
    if not (target / known_by).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} exists and has no {known_by}", "name another folder")
    if not overwrite:
        raise OutputError(f"{target} exists already", "name another folder, or replace it with --overwrite")


def _move(work: Path, target: Path) -> None:
    """Rename a finished folder to its target. A bundle that is there is put aside first, and back if that fails."""
    old = beside(target, "old")
    with contextlib.suppress(FileNotFoundError):
        target.rename(old)
    try:
        work.rename(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_hint(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, or name a folder on another disk"
    return "check the path and its rights"
