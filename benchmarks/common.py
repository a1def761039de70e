"""What the benchmarks share: measured subprocesses, facts about the machine, tables, results as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from zimgkit.export.networks.registry import FAMILIES

ROOT = Path(__file__).resolve().parents[1]

TOOLS = ("zimgkit", "numpy", "onnxruntime", "torch", "diffusers", "transformers")
GPU_TOOLS = ("onnxruntime-gpu", "tensorrt", "tensorrt_rtx", "onnxruntime-ep-nv-tensorrt-rtx", "cuda-bindings", "triton")


@dataclass(frozen=True)
class Measured:
    """How a subprocess went."""

    exit_code: int
    seconds: float
    peak_bytes: int
    """The most memory it had resident, mapped files included."""
    output: str
    """Standard output and standard error together."""


LAUNCHER = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - start
os.write(int(sys.argv[1]), f"{os.waitstatus_to_exitcode(status)} {seconds} {usage.ru_maxrss}".encode())
"""
"""A child's peak memory starts at what its parent has resident when it forks, so a small process starts the child."""


def measure(command: Sequence[str | os.PathLike[str]], env: dict[str, str] | None = None) -> Measured:
    """Run a command and take its time and peak memory.

    Args:
        command: the program and its arguments.
        env: variables to set beside those of this process.
    """
    reader, writer = os.pipe()
    launcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, str(writer), *command],
        env=os.environ | (env or {}),
        pass_fds=[writer],
        process_group=0,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    os.close(writer)
    with os.fdopen(reader) as result:
        try:
            output, _ = launcher.communicate()
        except BaseException:
            # Ctrl-C: the command must not go on writing into a folder that is being removed.
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
            raise
        figures = result.read().split()
    if not figures:
        raise SystemExit(f"{command[0]} could not be started:\n{output}")
    peak = int(figures[2]) * (1 if sys.platform == "darwin" else 1024)
    return Measured(int(figures[0]), float(figures[1]), peak, output)


def run(command: Sequence[str | os.PathLike[str]], env: dict[str, str] | None = None) -> Measured:
    """As :func:`measure`, for a command that must not fail.

    Raises:
        SystemExit: it failed; what it printed is the message.
    """
    done = measure(command, env)
    if done.exit_code:
        raise SystemExit(f"{command[0]} failed with {done.exit_code}:\n{done.output}")
    return done


def start(main: Callable[[], int | None]) -> NoReturn:
    """Run a script so that, when it is told to end, its temporary folders and subprocesses go with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())


def own_cache(folder: Path) -> dict[str, str]:
    """The environment of a run that leaves nothing in the user's cache, and finds nothing there but traced networks.

    For scripts that do not time a build.

    Args:
        folder: where the cache goes.
    """
    from platformdirs import user_cache_path

    traces, cache = user_cache_path("zimgkit") / "traces", folder / "cache"
    traces.mkdir(parents=True, exist_ok=True)
    (cache / "zimgkit").mkdir(parents=True, exist_ok=True)
    (cache / "zimgkit" / "traces").symlink_to(traces, target_is_directory=True)
    return {"XDG_CACHE_HOME": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache)}


def console_script(name: str) -> str:
    """The path of a command that is installed beside this Python."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not installed: pip install -e '.[dev]'")
    return found


def reference() -> ModuleType:
    """The random reference pipelines and the byte-level tokenizer of the tests; imports torch and diffusers."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return import_module("tests.reference")


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, memory, load, versions."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.system(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version for name in (*TOOLS, *GPU_TOOLS) if (version := _version(name))},
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


def parser(about: str | None, *, family: bool = True, folder: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that the scripts share: ``--family``, ``--folder`` and ``--json``."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if family:
        made.add_argument("--family", choices=FAMILIES, help="[default: all]")
    if folder:
        made.add_argument("--folder", type=Path, help="where to make the temporary folder [default: the system's]")
    made.add_argument("--json", type=Path, help="write the figures there as well")
    return made


def families(options: argparse.Namespace) -> tuple[str, ...]:
    """Those that ``--family`` asks for."""
    return (options.family,) if options.family else tuple(FAMILIES)


def each(
    cases: Iterable[Any],
    options: argparse.Namespace,
    measure_one: Callable[[Any, Path], Any],
    report: Callable[[Any], int],
) -> int:
    """Measure cases one after the other, each in a temporary folder; print and save what is there after each.

    Args:
        cases: what is measured: the families, say.
        options: ``folder``, where the temporary folders are made, and ``json``, where results go; None for either.
        measure_one: given a case and its folder; its result.
        report: prints a result; whether a bound is broken.

    Returns:
        The exit code of the script.
    """
    facts, results, broken = machine(), [], 0
    for case in cases:
        with tempfile.TemporaryDirectory(prefix=f"zimg-{Path(sys.argv[0]).stem}-", dir=options.folder) as folder:
            results.append(measure_one(case, Path(folder)))
        broken |= report(results[-1])
        save(options.json, facts, results)
    return broken


def broken_bounds(bounds: Iterable[tuple[str, float, float]]) -> int:
    """Print each (name, value, upper bound) and whether it holds; the exit code of the script."""
    broken = 0
    for name, value, bound in bounds:
        holds = value < bound
        broken |= not holds
        print(f"{'ok    ' if holds else 'BROKEN'}  {name}: {value:.4g} (bound {bound:.4g})")
    return int(broken)
