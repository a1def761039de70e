"""The memory that engines hold and work in on the CPU, by backend, precision and size, beside what the runtime reckons.

Each engine is opened and run in a process of its own, on random inputs, while its anonymous memory is watched. Weights
that stay mapped are not part of that: the system takes their memory back where it is short. The factors in
``runtime/memory/needs.py`` are from here.

    python benchmarks/engine_memory.py BUNDLE… --backend onnxruntime --backend torch --size 256 --size 512
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import common
from component_run import random_feeds

from zimgkit.engines.base import BACKENDS, open_engine
from zimgkit.engines.bundle import Bundle
from zimgkit.runtime.families import family_of
from zimgkit.runtime.memory.needs import ORDER, host_needs, precision_of, stored_bytes, with_scores

INTERVAL = 0.002
"""Seconds between looks."""
TOKENS = 96
"""Of the prompt, template included."""
FIGURES = ("opening", "held", "reckoned_held", "working", "reckoned_working")


def anonymous() -> int:
    """Bytes of this process that are resident and of no file."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) << 10


@contextmanager
def watch() -> Iterator[list[int]]:
    """The most anonymous memory beyond that at the start, as the only entry of a list."""
    start, stop, peak = anonymous(), threading.Event(), [0]

    def look() -> None:
        while not stop.wait(INTERVAL):
            peak[0] = max(peak[0], anonymous() - start)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
        peak[0] = max(peak[0], anonymous() - start)


def dynamic_dimensions(bundle: Bundle, size: int) -> dict[str, int]:
    """Of a square picture of this size in pixels."""
    return family_of(bundle.manifest).dynamic_dimensions(size, size, TOKENS) | {"batch": 1}


def measured(folder: Path, component: str, backend: str, size: int) -> dict[str, int]:
    """Open an engine in this process and run it twice.

    Returns:
        Bytes: ``opening``, at the most while it is opened; ``held`` afterwards; ``working`` beside that at the most.
    """
    bundle = Bundle.open(folder, verify=False)
    feeds = random_feeds(bundle.component(component).inputs, dynamic_dimensions(bundle, size))
    import_module(BACKENDS[backend])
    start = anonymous()
    with watch() as opening:
        engine = open_engine(bundle, component, backend, "cpu")
    ctypes.CDLL(None).malloc_trim(0)  # What opening has freed would hide what runs take.
    held = anonymous() - start
    with watch() as working:
        for _ in range(2):
            engine.run(feeds)
    engine.close()
    return {"opening": opening[0], "held": held, "working": working[0]}


def reckoned(folder: Path, component: str, backend: str, size: int) -> dict[str, int]:
    """What a plan takes for granted of such an engine, in bytes."""
    bundle = Bundle.open(folder, verify=False)
    manifest, sizes = bundle.manifest, dynamic_dimensions(bundle, size)
    family, scores = family_of(manifest), with_scores(manifest, backend)
    needs = host_needs(stored_bytes(manifest), precision_of(manifest), family, backend, sizes, scores=scores)
    return {"reckoned_held": needs[component].held, "reckoned_working": needs[component].working}


def report(rows: list[Mapping[str, Any]]) -> str:
    """The results as a table, in MiB."""
    header = ("bundle", "backend", "component", "size", *FIGURES)
    names = ("bundle", "backend", "component", "size")
    return common.table(
        header, [[*(row[n] for n in names), *(f"{row[figure] / 2**20:.0f}" for figure in FIGURES)] for row in rows]
    )


def main() -> int:
    """The script."""
    parser = common.parser(__doc__, family=False, folder=False)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--component", action="append", choices=ORDER, help="may be repeated [default: all]")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated [default: onnxruntime]")
    parser.add_argument("--size", action="append", type=int, help="may be repeated [default: 256 and 512]")
    parser.add_argument("--one", action="store_true", help=SUPPRESS)
    options = parser.parse_args()
    components, backends = options.component or ORDER, options.backend or ["onnxruntime"]
    if options.one:
        print(json.dumps(measured(options.bundles[0], components[0], backends[0], options.size[0])))
        return 0
    facts, rows = common.machine(), []
    for folder in options.bundles:
        for backend in backends:
            for component in components:
                for size in options.size or (256, 512):
                    command = [sys.executable, __file__, folder, "--component", component, "--backend", backend]
                    done = common.run([*command, "--size", str(size), "--one"])
                    row = {"bundle": folder.name, "backend": backend, "component": component, "size": size}
                    row |= json.loads(done.output.splitlines()[-1]) | reckoned(folder, component, backend, size)
                    rows.append(row)
                    common.save(options.json, facts, rows)
    print(report(rows))
    return 0


if __name__ == "__main__":
    common.start(main)
