"""What is free, from files as Linux has them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from zimgkit.runtime.memory.machine import UNLIMITED, free_memory

GIB = 1 << 30


def machine(root: Path, files: dict[str, object]) -> Path:
    """A root with these files below it, and 16 GiB available."""
    available = {"proc/meminfo": f"MemTotal: {24 << 20} kB\nMemFree: 5 kB\nMemAvailable:   {16 << 20} kB\n"}
    for name, content in (available | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(content))
    return root


def v2(path: str, limit: object, used: int, cached: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup{path}"
    stat = f"anon 1\nfile {cached}\ninactive_file {cached // 2}\nactive_file {cached - cached // 2}\n"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": used, f"{folder}/memory.stat": stat}


def v1(path: str, limit: object, used: int, cached: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory{path}"
    stat = f"cache 7\ninactive_file 3\ntotal_inactive_file {cached}\ntotal_active_file 0\n"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": stat,
    }


V1_PATH = {"proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/docker/abc\n0::/\n"}
V2_PATH = {"proc/self/cgroup": "0::/user.slice/run-1.scope\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, (16, "the machine")),
        (V2_PATH, (16, "the machine")),
        (V2_PATH | v2("/user.slice/run-1.scope", "max\n", GIB), (16, "the machine")),
        (V2_PATH | v2("/user.slice/run-1.scope", 8 * GIB, GIB), (7, "the control group")),
        # The system takes cached files back.
        (V2_PATH | v2("/user.slice/run-1.scope", 8 * GIB, 8 * GIB, 5 * GIB), (5, "the control group")),
        # A group around it is tighter.
        (V2_PATH | v2("/user.slice/run-1.scope", "max", 0) | v2("/user.slice", 4 * GIB, GIB), (3, "the control group")),
        (V2_PATH | v2("/user.slice/run-1.scope", 2 * GIB, 3 * GIB), (0, "the control group")),
        # In a container the path is that outside of it.
        ({"proc/self/cgroup": "0::/../../elsewhere\n"} | v2("", 8 * GIB, GIB), (7, "the control group")),
        (V1_PATH | v1("", 8 * GIB, 2 * GIB, GIB), (7, "the control group")),
        (V1_PATH | v1("/docker/abc", 4 * GIB, GIB) | v1("", 8 * GIB, GIB), (3, "the control group")),
        (V1_PATH | v1("/docker/abc", 9223372036854771712, GIB), (16, "the machine")),
        ({"proc/self/cgroup": "0::/\n"} | v2("", "nonsense", 0), (16, "the machine")),
    ],
)
def test_the_tightest_limit_counts(tmp_path: Path, files: dict[str, object], free: tuple[int, str]) -> None:
    found = free_memory(machine(tmp_path, files))
    assert (found.memory / GIB, found.limit) == free


def test_without_proc_nothing_is_known(tmp_path: Path) -> None:
    assert free_memory(tmp_path).memory == UNLIMITED


def test_of_this_machine() -> None:
    found = free_memory()
    assert 0 < found.memory < 1 << 50
    assert found.limit


def test_reading_it_takes_no_time() -> None:
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        free_memory()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.002


@pytest.mark.parametrize(("limit", "field"), [("RLIMIT_AS", "address_space"), ("RLIMIT_DATA", "memory")])
def test_limits_of_the_process(limit: str, field: str) -> None:
    code = f"""if True:
        import resource
        from zimgkit.runtime.memory.machine import free_memory
        resource.setrlimit(resource.{limit}, (1 << 30, resource.RLIM_INFINITY))
        held = bytearray(1 << 28)
        print(free_memory().{field})
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert 0.3 * GIB < int(done.stdout) < 0.75 * GIB
