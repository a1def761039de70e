"""What the processor can do, and the memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
VNNI = ("avx512_vnni", "avx_vnni")
"""Instructions that add products of 8-bit integers in 32 bits."""


@cache
def processor_flags() -> frozenset[str]:
    """The processor's instruction sets as Linux names them, such as ``"avx512_bf16"``; empty where they are unknown."""
    try:
        lines = CPUINFO.read_text("utf-8", "replace").splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, ()))


def adds_integers_exactly() -> bool:
    """Whether products of unsigned and signed 8-bit integers are added without overflow; x86 needs VNNI for that."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i686", "x86")
    return not is_x86 or not processor_flags().isdisjoint(VNNI)


def give_back_freed() -> None:
    """Give memory that was freed back to the system, which glibc keeps otherwise; elsewhere nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
