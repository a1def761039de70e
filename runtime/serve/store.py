"""Pictures that clients fetch by address, for a while: in memory, bounded in bytes."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Kept:
    """A picture's file."""

    data: bytes = field(repr=False)
    media_type: str
    until: float


class Store:
    """Files by names that nobody can guess.

    Args:
        seconds: how long each is kept, unless newer ones need its place.
        most_bytes: of all together.
    """

    def __init__(self, seconds: float = 3600, most_bytes: int = 1 << 28) -> None:
        self.seconds, self.most_bytes = seconds, most_bytes
        self._files: OrderedDict[str, Kept] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, data: bytes, media_type: str) -> str:
        """Keep a file; returns its name."""
        name = secrets.token_urlsafe(24)
        with self._lock:
            self._files[name] = Kept(data, media_type, time.monotonic() + self.seconds)
            self._bytes += len(data)
            # The oldest are first, and the newest stays however large it is.
            while len(self._files) > 1 and (self._bytes > self.most_bytes or self._oldest().until < time.monotonic()):
                self._bytes -= len(self._files.popitem(last=False)[1].data)
        return name

    def get(self, name: str) -> Kept | None:
        """A file that is still kept."""
        with self._lock:
            found = self._files.get(name)
        return found if found and found.until >= time.monotonic() else None

    def _oldest(self) -> Kept:
        return next(iter(self._files.values()))
