"""The memory that this process can still take: of the machine, of its control group, and within its own limits.

Sources: proc(5), the kernel's documentation of control groups (cgroup-v1/memory, cgroup-v2) and getrlimit(2).
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 62
"""Bytes, where nothing is known to limit them."""


@dataclass(frozen=True)
class Free:
    """What this process can still take, in bytes."""

    memory: int
    """Of its own, which nobody can take back: files that are mapped do not count."""
    limit: str
    """What sets that bound, in words."""
    address_space: int = UNLIMITED
    """Mapped files included."""


def free_memory(root: Path = Path("/")) -> Free:
    """What is free now. Without a ``/proc`` there is no limit.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    size, data = _own_pages(root)
    found = {
        "the machine": _fields(root / "proc/meminfo").get("MemAvailable", UNLIMITED >> 10) << 10,
        "the control group": min(_of_control_groups(root), default=UNLIMITED),
        "RLIMIT_DATA": _below(resource.RLIMIT_DATA, data),
    }
    limit = min(found, key=found.__getitem__)
    return Free(found[limit], limit, _below(resource.RLIMIT_AS, size))


def _own_pages(root: Path) -> tuple[int, int]:
    """Bytes of this process's address space, and those of its data."""
    try:
        pages = (root / "proc/self/statm").read_text().split()
        page = os.sysconf("SC_PAGE_SIZE")
        return int(pages[0]) * page, int(pages[5]) * page
    except (OSError, ValueError, IndexError):
        return 0, 0


def _below(limit: int, used: int) -> int:
    soft = resource.getrlimit(limit)[0]
    return UNLIMITED if soft == resource.RLIM_INFINITY else max(0, soft - used)


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file of ``name value`` lines; of none where it is missing."""
    try:
        lines = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
        return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
    except OSError:
        return {}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # There is none, or it is "max".
        return None


def _of_control_groups(root: Path) -> Iterator[int]:
    """What the control groups that this process is in, and those around them, have left."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names, prefix = mount, ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            base, names, prefix = mount / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        else:
            continue
        group = base / path.strip("/")
        # In a container the path may be that outside of it: what is not there is passed over.
        for folder in (group, *group.parents):
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None:
                held = _fields(folder / "memory.stat")
                # The system takes cached files back before it refuses.
                cached = held.get(f"{prefix}inactive_file", 0) + held.get(f"{prefix}active_file", 0)
                yield max(0, limit - max(0, used - cached))
            if folder == base:
                break
