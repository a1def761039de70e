"""The memory that engines hold and work in, by backend, precision and size, and what ``runtime/memory`` reckons.

Each engine is opened and run in a process of its own, on random inputs, while its anonymous and file-backed memory is
watched. Weights that stay mapped are file-backed: the system takes them back where memory is short.

    python benchmarks/engine_memory.py BUNDLE… --sizes 256 512 768 --backend onnxruntime torch --json FILE
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import measure, print_table, write_json

from zimgkit.engines.base import BACKENDS, open_engine
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.shapes import output_shape
from zimgkit.runtime.families import family_of
from zimgkit.runtime.memory.needs import needs_of

INTERVAL = 0.002
"""Seconds between looks."""
TOKENS = 96
"""Of the prompt."""


def resident() -> tuple[int, int]:
    """Bytes of this process that are anonymous, and those of files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, files = (int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssFile"))
    return anonymous, files


@contextmanager
def watch() -> Iterator[list[int]]:
    """The most anonymous memory beyond that at the start, as the only entry of a list."""
    start, stop, peak = resident()[0], threading.Event(), [0]

    def look() -> None:
        while not stop.wait(INTERVAL):
            peak[0] = max(peak[0], resident()[0] - start)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
        peak[0] = max(peak[0], resident()[0] - start)


def inputs(bundle: Bundle, component: str, size: int) -> dict[str, Any]:
    """Random inputs of a component for a square picture."""
    sizes = family_of(bundle.manifest).dynamic_dimensions(size, size, TOKENS) | {"batch": 1}
    rng = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for name, spec in bundle.component(component).inputs.items():
        shape = output_shape(spec, sizes)
        if spec.dtype == "bool":
            feeds[name] = np.zeros(shape, bool)
        elif spec.dtype == "int64":
            feeds[name] = rng.integers(0, 100, shape)
        else:
            feeds[name] = rng.uniform(-1, 1, shape).astype(np.float32)
    return feeds


def measured(folder: Path, component: str, backend: str, size: int) -> dict[str, Any]:
    """Open an engine in this process, run it twice, and say what it took, in bytes."""
    bundle = Bundle.open(folder, verify=False)
    feeds = inputs(bundle, component, size)
    __import__(BACKENDS[backend])
    start = resident()[0]
    with watch() as opening:
        engine = open_engine(bundle, component, backend, "cpu")
    ctypes.CDLL(None).malloc_trim(0)  # What opening has freed would hide what runs take.
    held = resident()[0] - start
    with watch() as running:
        for _ in range(2):
            engine.run(feeds)
    found = {"opening": opening[0], "held": held, "working": running[0], "file_backed": resident()[1]}
    engine.close()
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--components", nargs="+", default=["text_encoder", "denoiser", "vae_decoder"])
    parser.add_argument("--backend", nargs="+", default=["onnxruntime"], choices=list(BACKENDS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512, 768])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.bundles[0], options.components[0], options.backend[0], options.sizes[0])))
        return
    rows = []
    for folder in options.bundles:
        manifest = Bundle.open(folder, verify=False).manifest
        for backend in options.backend:
            for component in options.components:
                for size in options.sizes:
                    command = [sys.executable, __file__, folder, "--components", component, "--backend", backend]
                    done = measure([*command, "--sizes", str(size), "--one"])
                    name = {"bundle": folder.name, "backend": backend, "component": component, "size": size}
                    if done.exit_code:
                        print(f"  {name}: {done.output.strip().splitlines()[-1]}", file=sys.stderr)
                        continue
                    need = needs_of(manifest, backend, size, size, TOKENS)[component]
                    reckoned = {"reckoned_held": need.held, "reckoned_working": need.working}
                    row = name | json.loads(done.output.splitlines()[-1]) | reckoned
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr, flush=True)
    figures = ("opening", "held", "reckoned_held", "working", "reckoned_working")
    print_table(
        ("bundle", "backend", "component", "size", *(f"{name}, MiB" for name in figures)),
        [
            (
                row["bundle"],
                row["backend"],
                row["component"],
                str(row["size"]),
                *(f"{row[n] / 2**20:.0f}" for n in figures),
            )
            for row in rows
        ],
    )
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
