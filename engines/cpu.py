"""What the CPU of this machine can do."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
VNNI = ("avx512_vnni", "avx_vnni")
"""Instructions that add products of 8-bit integers in 32 bits."""

BFLOAT16 = ("avx512_bf16", "amx_bf16")
"""Those that add products of bfloat16."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the kernel calls the CPU's instruction sets, such as ``"avx2"``; none where it does not say."""
    try:
        lines = CPUINFO.read_text("utf-8", "replace").splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, ()))


def lacks_avx2(flags: frozenset[str]) -> bool:
    """Whether this is an x86 processor without AVX2, as far as its flags are known."""
    return _is_x86() and bool(flags) and "avx2" not in flags


def adds_integers_exactly() -> bool:
    """Whether products of unsigned and signed 8-bit integers are added without overflow; x86 needs VNNI for that."""
    return not _is_x86() or not cpu_flags().isdisjoint(VNNI)


def multiplies_bfloat16() -> bool:
    """Whether there are instructions for products of bfloat16."""
    return not cpu_flags().isdisjoint(BFLOAT16)


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")
