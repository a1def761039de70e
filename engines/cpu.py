"""What the CPU of this machine can do."""

from __future__ import annotations

import functools
import platform
from pathlib import Path


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the kernel calls the CPU's instruction sets, such as ``"avx2"``; none where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def lacks_avx2(flags: frozenset[str]) -> bool:
    """Whether this is an x86 processor without AVX2, as far as its flags are known."""
    return platform.machine() in ("x86_64", "AMD64") and bool(flags) and "avx2" not in flags
