"""What was made last, kept for the next who asks for it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values by key; of more than some, that which was asked for longest ago is dropped. Threads may share one.

    Two threads that ask for the same at once may both make it.

    Args:
        most: how many are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, Value] = OrderedDict()
        self.asked = 0
        """How often a value was asked for."""
        self.found = 0
        """How often it was kept."""

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of a key, which is made where it is not kept."""
        with self._lock:
            self.asked += 1
            if key in self._kept:
                self.found += 1
                self._kept.move_to_end(key)
                return self._kept[key]
        value = make()
        with self._lock:
            self._kept[key] = value
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return value
