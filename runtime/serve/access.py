"""Who may ask."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from zimgkit.engines.errors import UsageError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    keys: Collection[str] = ()
    origins: Collection[str] = ()
    hosts: Collection[str] = ()
    log: bool = True
    """Whether each request is logged."""


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file, one in each line.

    Raises:
        UsageError: it cannot be read, or has none.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        told = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"{path} cannot be read ({told})", "give a text file with a key in each line") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise UsageError(f"{path} has no key", "write one in each line")
    return keys
