"""What the benchmarks share: measured subprocesses, facts about the machine, tables, results as JSON."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # The random models of the tests serve here too.

FAMILIES = ("z-image", "qwen-image")
TOOLS = ("zimg", "numpy", "onnxruntime", "torch", "diffusers", "transformers")


@dataclass(frozen=True)
class Measured:
    """How a subprocess went."""

    exit_code: int
    seconds: float
    peak_bytes: int
    """The most memory it had resident, mapped files included."""
    output: str
    """Standard output and standard error together."""


def measure(command: Sequence[str | os.PathLike[str]], env: dict[str, str] | None = None) -> Measured:
    """Run a command and take its time and peak memory.

    On Linux a child's peak starts at what its parent had resident when it was forked, so a script that calls this
    must not have imported anything heavy before.

    Args:
        command: the program and its arguments.
        env: variables to set beside those of this process.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=os.environ | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with process:
        output = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measured(process.returncode, seconds, peak, output)


def console_script(name: str) -> str:
    """The path of a command that is installed beside this Python."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not installed: pip install -e '.[dev]'")
    return found


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, memory, load, versions."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.system(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version for name in TOOLS if (version := _version(name))},
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns of text: the first to the left, the others to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(line))
        for line in (list(zip(row, widths, strict=True)) for row in cells)
    )


def save(path: Path | None, facts: dict[str, Any], results: Any) -> None:
    """Write results beside the command that made them and the machine they were taken on; nothing without a path."""
    if path is None:
        return
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    text = json.dumps({"command": command, "machine": facts, "results": results}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def broken_bounds(bounds: Iterable[tuple[str, float, float]]) -> int:
    """Print each (name, value, upper bound) and whether it holds; the exit code of the script."""
    broken = 0
    for name, value, bound in bounds:
        holds = value < bound
        broken |= not holds
        print(f"{'ok    ' if holds else 'BROKEN'}  {name}: {value:.4g} (bound {bound:.4g})")
    return int(broken)
