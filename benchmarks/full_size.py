"""The released models' real shapes, built, opened and run on this machine: memory, anonymous and of files, and time.

The checkpoint has the real configs, names and shards. Its weights are one block of random numbers, repeated; where the
disk is too short for that, they are zero and take none. FP8 and INT8 take scales from synthetic statistics, unless
--calibrate runs a real calibration. Each component is opened and run in a process of its own; so is a whole picture
(--component picture), for which the runtime plans by the memory it finds. All is removed at the end. Exits with 1
where one could not be run, gave NaN or Inf, or took more memory of its own to open than 1.3 times its weights as they
are stored and 1 GiB. Pages of mapped files count apart: the system takes them back where it is short.

    python benchmarks/full_size.py --family FAMILY --precision int8 bf16 --backend onnxruntime openvino --size 512
    python benchmarks/full_size.py --family FAMILY --precision int8-weights --limit-memory 16
    python benchmarks/full_size.py --family FAMILY --precision int8 --component picture --steps 8 --limit-memory 8
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
from component_run import PICTURE, PROMPT

PRECISIONS = ("bf16", "fp8", "int8", "int8-dynamic", "int8-weights", "int4-weights")
COMPONENTS = ("text_encoder", "denoiser", "vae_decoder")
MEASURED = (*COMPONENTS, PICTURE)
BACKENDS = ("auto", "onnxruntime", "openvino", "torch")
OPENING = 1.3
"""Times the bytes of a component's weights as they are stored ..."""
OPENING_GIB = 1.0
"""... and this are what opening it may take of anonymous memory."""
SPARE = 10 * 10**9
"""Bytes of the disk that are left free."""
SAMPLE_SECONDS = 0.02
PROMPTS = (PROMPT, "a city in the rain at night", "一只猫在窗边", "a map of an island")
KINDS = {"RssAnon": "anonymous", "RssFile": "files", "RssShmem": "shared"}
"""https://docs.kernel.org/filesystems/proc.html"""
GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
LIMITS = ("memory.limit_in_bytes", "memory.max")
"""Of control groups, version 1 and 2."""

Sample = tuple[float, dict[str, int]]
Event = dict[str, Any]


def resident(process: int) -> dict[str, int]:
    """Bytes that a process has resident, by kind; empty once it is gone."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        return {kind: 1024 * int(fields[key].split()[0]) for key, kind in KINDS.items() if key in fields}
    return {}


@contextlib.contextmanager
def control_group(limit_gib: float | None) -> Iterator[Path | None]:
    """A control group whose memory, cached files included, is limited; its ``cgroup.procs``, or None without a limit.

    Raises:
        SystemExit: this machine lets nobody make one.
    """
    if limit_gib is None:
        yield None
        return
    made = None
    for parent, limit in zip(GROUPS, LIMITS, strict=True):
        group = parent / f"zimg-full-size-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            made = group
            (group / limit).write_text(str(int(limit_gib * 2**30)))
            break
        if made:
            made.rmdir()
            made = None
    if made is None:
        raise SystemExit("--limit-memory needs a control group of memory that can be written; run it as root")
    try:
        yield made / "cgroup.procs"
    finally:
        made.rmdir()


def watch(command: Sequence[str | os.PathLike[str]], log: Path) -> tuple[int, list[Event], list[Sample]]:
    """Run a command that prints events as lines of JSON, and sample its memory meanwhile.

    Args:
        command: the program and its arguments.
        log: a file for what it prints.

    Returns:
        Its exit code, the events, and samples of (time, bytes by kind).
    """
    samples: list[Sample] = []
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            while process.poll() is None:
                samples.append((time.monotonic(), resident(process.pid)))
                time.sleep(SAMPLE_SECONDS)
        except BaseException:
            process.kill()
            raise
    lines = log.read_text("utf-8", "replace").splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    if process.returncode and not events:
        raise SystemExit("\n".join(lines[-20:]) or f"{command} ended with {process.returncode}")
    return process.returncode, events, samples


def summary(code: int, events: Sequence[Event], samples: Sequence[Sample]) -> dict[str, Any]:
    """What a run of ``component_run.py`` took.

    Returns:
        ``outcome``: ``"ran"``, or what happened instead; ``opening`` and ``running``: ``peak``, bytes by kind at the
        moment of the most resident memory, with that as ``"resident"``, and the most that was anonymous; ``seconds``
        and ``cpu_seconds``, of each run apart; ``held``: bytes by kind when it was open; ``finite``; of a picture
        ``took``: the backend that the runtime's plan ended with.
    """
    found: dict[str, Any] = {"outcome": "ran"}
    if error := next((event["error"] for event in events if event["event"] == "failed"), None):
        found["outcome"] = error
    elif code:
        after = events[-1]["event"] if events else "nothing"
        found["outcome"] = f"killed with signal {-code} after {after}" if code < 0 else f"ended with {code}"
    marks = [event for event in events if event["event"] in ("start", "opened", "ran")]
    end = samples[-1][0] if samples else 0.0
    opened = next((event["time"] for event in marks if event["event"] == "opened"), end)
    if marks:
        found["opening"] = _phase(marks[:2], samples, marks[0]["time"], opened)
    if len(marks) > 1:
        found["held"] = next((kinds for when, kinds in reversed(samples) if when <= opened and kinds), {})
        found["running"] = _phase(marks[1:], samples, opened, end)
    if marks and "took" in marks[-1]:
        found["took"] = marks[-1]["took"]
    found["finite"] = all(event["finite"] for event in marks if event["event"] == "ran")
    return found


def _phase(marks: Sequence[Event], samples: Sequence[Sample], start: float, end: float) -> dict[str, Any]:
    inside = [kinds for when, kinds in samples if start <= when <= end and kinds]
    totals = [sum(kinds.values()) for kinds in inside]
    peak = inside[totals.index(max(totals))] | {"resident": max(totals)} if inside else {}
    pairs = list(itertools.pairwise(marks))
    return {
        "peak": peak,
        "anonymous_peak": max((kinds.get("anonymous", 0) for kinds in inside), default=0),
        "seconds": [round(after["time"] - before["time"], 3) for before, after in pairs],
        "cpu_seconds": [round(after["cpu"] - before["cpu"], 3) for before, after in pairs],
    }


def write_checkpoint(family: str, folder: Path) -> dict[str, Any]:
    """Write a checkpoint: random where the disk has room for it and a bundle of half the size, else of holes."""
    script = Path(__file__).with_name("random_checkpoint.py")
    holes = common.run([sys.executable, script, family, folder, "--holes"])
    size = int(holes.output.split()[-1])
    weights = "zero"
    if shutil.disk_usage(folder).free > 1.5 * size + SPARE:
        shutil.rmtree(folder)
        common.run([sys.executable, script, family, folder])
        weights = "random"
    return {"bytes": size, "weights": weights}


def build(model: Path, bundle: Path, precision: str, given: Sequence[str | os.PathLike[str]] = ()) -> dict[str, Any]:
    """Build a bundle; the time and the peak memory that it took."""
    exporter = common.console_script("zimg-export")
    arguments = ["build", "--model", model, "--out", bundle, "--precision", precision, "--quiet"]
    done = common.run([exporter, *arguments, *given])
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    return {"seconds": round(done.seconds, 1), "peak_bytes": done.peak_bytes, "bytes": size}


def statistics_of(model: Path, folder: Path, *, calibrate: bool) -> tuple[dict[str, Any], Path]:
    """What a build of INT8 takes the scales of inputs from, made through a bfloat16 bundle that does not stay.

    Args:
        model: the checkpoint.
        folder: where they are made.
        calibrate: run a real calibration, small as it is; else the statistics are synthetic.

    Returns:
        What it took, and the file.
    """
    bundle, found = folder / "float", folder / "float.calibration.safetensors"
    build(model, bundle, "bf16")
    if calibrate:
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS))
        settings = ["--calibration-size", "256x256", "--calibration-steps", "1", "--prompts", prompts]
        done = common.run([common.console_script("zimg-export"), "calibrate", bundle, "--quiet", *settings])
    else:
        done = common.run([sys.executable, Path(__file__).with_name("synthetic_statistics.py"), bundle, found])
    shutil.rmtree(bundle)
    took = {"seconds": round(done.seconds, 1), "peak_bytes": done.peak_bytes}
    return {"scales": "calibrated" if calibrate else "synthetic", **took}, found


def measure(bundle: Path, case: Mapping[str, Any], steps: int, limit: float | None) -> dict[str, Any]:
    """Open and run a component in a process of its own.

    Args:
        bundle: its folder.
        case: of :func:`cases`.
        steps: runs of a denoiser, or a picture's; others run once.
        limit: GiB that the process may have, files that it reads included.
    """
    component = case["component"]
    script = Path(__file__).with_name("component_run.py")
    command = [sys.executable, script, bundle, component, "--backend", case["backend"], "--size", str(case["size"])]
    command += ["--runs", str(steps if component in ("denoiser", PICTURE) else 1)]
    with control_group(limit) as group, tempfile.TemporaryDirectory(prefix="zimg-full-size-") as folder:
        if group:
            _forget(bundle)
            command += ["--join", group]
        return summary(*watch(command, Path(folder) / "events"))


def _forget(bundle: Path) -> None:
    """Drop a bundle from the system's cache: files that are in it already count for nobody's limit."""
    for path in bundle.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cases(
    bundle: Path, backends: Sequence[str], sizes: Sequence[int], components: Sequence[str]
) -> list[dict[str, Any]]:
    """What is measured of a bundle: each component with each backend at each size.

    What ``auto`` chooses for a component counts once; for a picture the runtime chooses when it plans it.
    """
    from zimgkit.engines.bundle.manifest import read_manifest
    from zimgkit.engines.choice import AUTO, choose_backend

    manifest = read_manifest(bundle)
    stored = {name: component.weight_bytes for name, component in manifest.components.items()}
    stored[PICTURE] = sum(stored.values())
    chosen = choose_backend(manifest, "cpu").backend
    named = [chosen if name == AUTO else name for name in backends]
    return [
        {
            "component": component,
            "backend": backend,
            "auto": backend in (AUTO, chosen),
            "size": size,
            "stored_bytes": stored[component],
        }
        for size in sizes
        for component in components
        for backend in dict.fromkeys(backends if component == PICTURE else named)
    ]


def bounds(result: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """What has to hold of a result, as :func:`common.broken_bounds` takes it."""
    for built in result["bundles"]:
        for run in built["runs"]:
            case = f"{built['precision']}, {run['backend']}, {run['component']}, {run['size']}"
            yield f"{case}: failures", float(run["outcome"] != "ran" or not run["finite"]), 1
            if "opening" in run:
                allowed = OPENING * run["stored_bytes"] / 2**30 + OPENING_GIB
                yield f"{case}: GiB to open", run["opening"]["anonymous_peak"] / 2**30, allowed


def report(result: Mapping[str, Any]) -> int:
    """Print a result; the exit code."""
    checkpoint = result["checkpoint"]
    print(f"\n{result['family']}: checkpoint of {checkpoint['bytes'] / 1e9:.1f} GB, weights {checkpoint['weights']}")
    header = ["GiB: all (anonymous)", "size", "stored", "to open", "opened", "to run", "opening", "run", "CPU", ""]
    rows = []
    for built in result["bundles"]:
        scales = f", {calibration['scales']} scales" if (calibration := built.get("calibration")) else ""
        gib = built["build"]["peak_bytes"] / 2**30
        print(f"  {built['precision']}: built in {built['build']['seconds']:.0f} s and {gib:.2f} GiB{scales}")
        rows += [(f"{built['precision']}, {run['backend']}, {run['component']}", *_cells(run)) for run in built["runs"]]
    print(common.table(header, rows), "\n")
    return common.broken_bounds(bounds(result))


def _cells(run: Mapping[str, Any]) -> list[str]:
    empty: dict[str, Any] = {"peak": {}, "anonymous_peak": 0, "seconds": [], "cpu_seconds": []}
    opening, running, held = run.get("opening", empty), run.get("running", empty), run.get("held", {})
    took = run.get("took", "")
    outcome = run["outcome"] if run["outcome"] != "ran" else took if run["finite"] else "NaN or Inf"
    return [
        str(run["size"]),
        f"{run['stored_bytes'] / 2**30:.2f}",
        _gib(opening["peak"].get("resident", 0), opening["anonymous_peak"]),
        _gib(sum(held.values()), held.get("anonymous", 0)),
        _gib(running["peak"].get("resident", 0), running["anonymous_peak"]),
        _median(opening["seconds"]),
        _median(running["seconds"]),
        _median(running["cpu_seconds"]),
        outcome,
    ]


def _gib(resident: int, anonymous: int) -> str:
    return f"{resident / 2**30:.2f} ({anonymous / 2**30:.2f})"


def _median(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f} s" if seconds else "-"


def measure_family(family: str, folder: Path, options: argparse.Namespace, save: Callable[[Any], object]) -> Any:
    """Write a checkpoint, build its bundles one after the other, and measure them.

    Args:
        family: its name.
        folder: an empty folder.
        options: of the script.
        save: called with the result so far.
    """
    model = folder / "checkpoint"
    result = {"family": family, "checkpoint": write_checkpoint(family, model), "bundles": []}
    for precision in options.precision:
        bundle, entry, given = folder / precision, {"precision": precision}, []
        if precision in ("fp8", "int8"):
            entry["calibration"], found = statistics_of(model, folder, calibrate=options.calibrate)
            given = ["--calibration", found]
        entry |= {"build": build(model, bundle, precision, given), "runs": []}
        result["bundles"].append(entry)
        for case in cases(bundle, options.backend, options.size, options.component):
            entry["runs"].append(case | measure(bundle, case, options.steps, options.limit_memory))
            print(f"  {precision}, {case['backend']}, {case['component']}: {entry['runs'][-1]['outcome']}", flush=True)
            save(result)
        shutil.rmtree(bundle)
    return result


def main() -> int:
    """The script."""
    parser = common.parser(__doc__)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, metavar="PRECISION")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=("auto",), metavar="BACKEND")
    parser.add_argument("--size", nargs="+", type=int, default=(512,), help="heights and widths in pixels")
    parser.add_argument("--component", nargs="+", choices=MEASURED, default=COMPONENTS, metavar="COMPONENT")
    parser.add_argument("--steps", type=int, default=1, help="runs of the denoiser, steps of a picture")
    parser.add_argument("--limit-memory", type=float, metavar="GIB", help="of each process, files it reads included")
    parser.add_argument("--calibrate", action="store_true", help="for fp8 and int8, with 4 prompts, one step, 256x256")
    options = parser.parse_args()
    facts, results, broken = common.machine(), [], 0

    def save(last: Any) -> None:
        common.save(options.json, facts, [*results, last])

    for family in common.families(options):
        with (
            tempfile.TemporaryDirectory(prefix="zimg-full-size-", dir=options.folder) as folder,
            patch.dict(os.environ, common.own_cache(Path(folder))),
        ):
            result = measure_family(family, Path(folder), options, save)
        save(result)
        results.append(result)
        broken |= report(result)
    return broken


if __name__ == "__main__":
    common.start(main)
