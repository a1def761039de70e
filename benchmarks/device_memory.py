"""The memory in use on a GPU, watched from outside of the process that uses it.

All backends are measured alike so: with contexts, workspaces and what allocators keep. Source of the calls: the
reference of NVML, the library that comes with the driver.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

INTERVAL = 0.02
"""Seconds between looks."""


class Memory(ctypes.Structure):
    """``nvmlMemory_t``, in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Peak:
    """The most memory that was used beyond what was used at the start, in bytes; None where it is not known."""

    beyond: int | None = None


@contextmanager
def watch(uuid: str | None) -> Iterator[Peak]:
    """Watch a GPU's memory for as long as the context lasts.

    Args:
        uuid: as NVML names it, ``"GPU-…"``; None where there is no GPU to watch.
    """
    peak = Peak()
    try:
        used = used_bytes(uuid) if uuid else None
    except OSError as error:
        print(f"  device memory is not measured: {error}")
        used = None
    if used is None:
        yield peak
        return
    start, stop = used(), threading.Event()
    peak.beyond = 0

    def look() -> None:
        while not stop.wait(INTERVAL):
            peak.beyond = max(peak.beyond or 0, used() - start)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


def used_bytes(uuid: str) -> Callable[[], int]:
    """A function that asks the driver how many bytes of a GPU are in use.

    Raises:
        OSError: the driver's library is not there, or does not know the device.
    """
    nvml, device = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
    _check(nvml.nvmlInit_v2(), "start")
    _check(nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device)), f"find {uuid}")
    return partial(_ask, nvml, device)


def _ask(nvml: ctypes.CDLL, device: ctypes.c_void_p) -> int:
    memory = Memory()
    _check(nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)), "ask for the memory")
    return int(memory.used)


def _check(code: int, what: str) -> None:
    if code:
        raise OSError(f"NVML cannot {what}: error {code}")
