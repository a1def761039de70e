"""The memory of handles on a GPU: it is the GPU's, not an engine's, and what is dropped is used again.

A recorded run names memory by address. The next upload or kept output of the same size takes the place of one that was
dropped, so that runs recorded for that place still serve.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from weakref import WeakValueDictionary

from zimgkit.engines.errors import BackendError, OutOfMemoryError
from zimgkit.engines.tensorrt import cuda

MAX_DROPPED = 32
"""Buffers that wait to be used again; those dropped longest ago are freed."""


class Memory:
    """Memory of a GPU that goes back to its pool when the last reference is dropped."""

    def __init__(self, pool: Pool, buffer: cuda.DeviceBuffer) -> None:
        self._pool, self._buffer = pool, buffer
        self.address = buffer.address

    def __del__(self) -> None:
        self._pool.take_back(self._buffer)


class Pool:
    """The memory of handles on one GPU; get it with :func:`pool_of`."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.frees = 0
        """How often buffers were freed, which voids runs that were recorded with them."""
        self._engines = 0
        # Handles are dropped at any time, in any thread, even while this one holds the lock: they are only noted.
        self._noted: deque[cuda.DeviceBuffer] = deque()
        self._lock = threading.RLock()
        self._dropped: list[cuda.DeviceBuffer] = []
        self._addresses: set[int] = set()

    def enter(self) -> None:
        """An engine was opened."""
        with self._lock:
            self._engines += 1

    def leave(self) -> None:
        """An engine was closed; what waits to be used again is freed."""
        with self._lock:
            self._engines -= 1
        self.trim()

    def allocate(self, nbytes: int) -> Memory:
        """Memory for a handle: that of a dropped one of this size, or a new one. Its bytes are undefined.

        Raises:
            OutOfMemoryError: the GPU has too little.
        """
        with self._lock:
            self._collect()
            for place, buffer in enumerate(self._dropped):
                if buffer.nbytes == nbytes:
                    return Memory(self, self._dropped.pop(place))
            self._free(len(self._dropped) - MAX_DROPPED)
            buffer = self.buffer(nbytes)
            self._addresses.add(buffer.address)
            return Memory(self, buffer)

    def buffer(self, nbytes: int) -> cuda.DeviceBuffer:
        """A buffer for whoever frees it; what waits to be used again is freed first where memory is short.

        Raises:
            OutOfMemoryError: the GPU has too little.
        """
        try:
            return cuda.DeviceBuffer(nbytes)
        except OutOfMemoryError:
            if not self.trim():
                raise
        return cuda.DeviceBuffer(nbytes)

    def holds(self, address: int) -> bool:
        """Whether a buffer of the pool begins there, in use or not."""
        return address in self._addresses

    def take_back(self, buffer: cuda.DeviceBuffer) -> None:
        """A handle was dropped."""
        self._noted.append(buffer)
        if not self._engines:
            self.trim()

    def trim(self) -> bool:
        """Free what waits to be used again; whether there was any."""
        with self._lock:
            self._collect()
            return self._free(len(self._dropped))

    def _collect(self) -> None:
        while self._noted:
            self._dropped.append(self._noted.popleft())

    def _free(self, count: int) -> bool:
        """Free those that were dropped first."""
        if count <= 0:
            return False
        freed, self._dropped = self._dropped[:count], self._dropped[count:]
        with contextlib.suppress(BackendError):  # What has failed before is not told again.
            cuda.use(self.index)
        for buffer in freed:
            self._addresses.discard(buffer.address)
            buffer.free()
        self.frees += 1
        return True


_POOLS: WeakValueDictionary[int, Pool] = WeakValueDictionary()
_LOCK = threading.Lock()


def pool_of(index: int) -> Pool:
    """The pool of a GPU, which lives as long as an engine or a handle there."""
    with _LOCK:
        pool = _POOLS.get(index)
        if pool is None:
            pool = _POOLS[index] = Pool(index)
        return pool
