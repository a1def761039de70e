"""Files that are whole or absent."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path


def beside(target: Path, ending: str) -> Path:
    """A new hidden name in the same folder: what lies there moves to ``target`` in one step."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{ending}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write; at the end it takes the place of ``path``, or where that fails, is gone.

    Raises:
        OSError: the file that was written cannot be moved.
    """
    part = beside(path, "part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
