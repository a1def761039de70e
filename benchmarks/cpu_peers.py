"""Whole pictures and components on the CPU: zimgkit in every precision and backend, and its peers, in turns in one run.

The models have a few hundred million random weights, and the VAEs have their real configs. All contestants draw from
one checkpoint on all cores: diffusers eager and compiled by torch.compile, in float32 and bfloat16, and zimgkit; with
--stable-diffusion-cpp that program too. Each is a process of its own, closed and opened again between its turns where
--memory is short of all of them; then its next turn is its second picture. Wall and CPU seconds are taken; on a busy
machine the latter are the ones to compare. OpenVINO by hand on an exported graph is zimgkit's own openvino backend: the
same graph, its functions inlined, and the same call.

With --task edit pictures are edited instead: new ones in each turn, of the size that is drawn, which the vision encoder
reads at 7/8 of their sides. What is computed once for a picture is thus computed in each turn.

    python benchmarks/cpu_peers.py
    python benchmarks/cpu_peers.py --task edit --pictures 1 2 --size 256
    python benchmarks/cpu_peers.py --family FAMILY --contestant diffusers "zimg int8" --steps 2 --repeats 3
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import families
import numpy as np
import stable_diffusion_cpp
from clock import WHOLE, Spent
from contestant_processes import Contestants, FailedError
from peer_contestants import DTYPES, Settings, image_file

WORKER = Path(__file__).with_name("peer_contestants.py")
PRECISIONS = ("fp32", "bf16", "int8", "int8-dynamic", "int8-weights", "int4-weights")
BACKENDS = ("onnxruntime", "openvino", "torch")
REFERENCE = "diffusers fp32"
"""Whose pictures the others are compared with."""
BASE = "zimg fp32 onnxruntime"
"""Whose times are 1."""
CONTESTANTS = (
    *(f"{kind} {name}" for kind in ("diffusers", "torch.compile") for name in DTYPES),
    *(f"stable-diffusion.cpp {kind}" for kind in stable_diffusion_cpp.TYPES),
    *(f"zimg {precision} {backend}" for precision in PRECISIONS for backend in BACKENDS),
)


def prepare(settings: Settings, folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Write a checkpoint and build its bundles, in a process whose memory goes with it; ``parameters``."""
    settings.save(folder)
    precisions = dict.fromkeys(name.split()[1] for name in names if name.startswith("zimg"))
    done = common.run([sys.executable, WORKER, folder, "prepare", *precisions])
    print(f"  checkpoint and bundles after {done.seconds:.0f} s, {done.peak_bytes / 2**30:.1f} GiB", flush=True)
    found: dict[str, Any] = json.loads(done.output.splitlines()[-1])
    return found


def race(settings: Settings, folder: Path, names: Sequence[str], repeats: int, limit: float) -> dict[str, Any]:
    """Let the contestants take turns.

    Args:
        settings: what they have in common.
        folder: what :func:`prepare` made, unless the settings name that.
        names: of :data:`CONTESTANTS`.
        repeats: turns of each, after one that does not count.
        limit: the most bytes of memory that all may have together.

    Returns:
        ``seconds`` and ``cpu_seconds``: contestant -> component -> those of each turn; ``first``: contestant -> the
        seconds that opening and its first picture took, where what is to be compiled is; ``peak_bytes``: contestant ->
        its most memory, mapped files included; ``all_peak_bytes``; ``difference``: contestant -> the largest difference
        of its first picture's pixels, 0 ... 1, from those of diffusers in float32, where that takes part; ``failed``:
        contestant -> why it has no times.
    """
    settings.save(folder)
    turns: dict[str, list[dict[str, Any]]] = defaultdict(list)
    failed: dict[str, str] = {}
    commands: dict[str, list[str | Path]] = {name: [sys.executable, WORKER, folder, name] for name in names}
    with Contestants(commands, folder, limit) as contestants:
        for turn in range(repeats):
            start = turn % len(names)
            for name in [*names[start:], *names[:start]]:
                if name in failed:
                    continue
                try:
                    turns[name].append(contestants.turn(name))
                except FailedError as error:
                    failed[name] = str(error)
                print(f"  {turn + 1}/{repeats} {name}: {failed.get(name) or _whole(turns[name])}", flush=True)
    ran = [name for name in names if name not in failed]
    taken = {
        kind: {
            name: {what: [turn[kind][what] for turn in turns[name]] for what in (*settings.components, WHOLE)}
            for name in ran
        }
        for kind in Spent._fields
    }
    return {
        "family": settings.family,
        "size": settings.size,
        "steps": settings.steps,
        "pictures": settings.pictures,
        "limit_bytes": limit,
        **taken,
        "first": contestants.first,
        "peak_bytes": contestants.peaks,
        "all_peak_bytes": contestants.peak,
        "difference": differences(folder, ran),
        "failed": failed,
    }


def _whole(turns: Sequence[Mapping[str, Any]]) -> str:
    return f"{turns[-1]['seconds'][WHOLE]:.2f} s"


def differences(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """How far each picture is from the reference's: nothing where that is not among these.

    stable-diffusion.cpp is left out: it draws another prompt.
    """
    if REFERENCE not in names:
        return {}
    images = {name: np.load(image_file(folder, name)) for name in names if not name.startswith("stable-diffusion.cpp")}
    return {name: float(np.abs(image - images[REFERENCE]).max()) for name, image in images.items()}


def report(result: Mapping[str, Any]) -> None:
    """Print the medians, and how many times as fast as :data:`BASE` each is."""
    size = f"{result['parameters'] / 1e6:.0f} million parameters, {result['size']}x{result['size']} pixels"
    names = list(result["seconds"])
    turns = len(result["seconds"][names[0]][WHOLE]) if names else 0
    edited = f", pictures edited: {result['pictures']}" if result["pictures"] else ""
    print(f"\n{result['family']}: {size}{edited}, {result['steps']} steps, {turns} turns each")
    for kind in Spent._fields if names else ():
        median = {
            name: {component: statistics.median(times) for component, times in found.items()}
            for name, found in result[kind].items()
        }
        base = median.get(BASE, median[names[0]])
        parts = tuple(base)
        rows = [
            [name, *(f"{found[part]:.3f} ({base[part] / found[part]:.2f})" for part in parts)]
            for name, found in median.items()
        ]
        header = f"{kind}, median (times as fast as {BASE if BASE in median else names[0]})"
        print(f"\n{common.table([header, *parts], rows)}")
    rows = [
        [name, found["opening_s"], found["first_picture_s"], f"{result['peak_bytes'].get(name, 0) / 2**30:.2f}"]
        for name, found in result["first"].items()
    ]
    print(f"\n{common.table(['', 'opening s', 'first picture s', 'peak GiB'], rows)}")
    all_peak, limit = result["all_peak_bytes"] / 2**30, result["limit_bytes"] / 2**30
    print(f"all together: at most {all_peak:.2f} GiB of {limit:.3g}")
    for name, difference in result["difference"].items():
        if name != REFERENCE:
            print(f"largest pixel difference of {name} from {REFERENCE}: {difference:.1e}")
    for name, reason in result["failed"].items():
        print(f"{name} did not run: {reason}")


def chosen(wanted: Sequence[str], program: Path | None = None) -> tuple[str, ...]:
    """The contestants whose names have all words of one of these; of those, what is installed.

    Args:
        wanted: words.
        program: stable-diffusion.cpp's.

    Raises:
        SystemExit: there is none.
    """
    there = {"openvino": bool(find_spec("openvino")), "stable-diffusion.cpp": bool(program)}
    installed = [name for name in CONTESTANTS if all(there.get(word, True) for word in name.split())]
    found = tuple(name for name in installed if any(set(one.split()) <= set(name.split()) for one in wanted))
    if not found:
        raise SystemExit(f"no contestant is called so; these are there: {', '.join(installed)}")
    return found


def main() -> int:
    """The script."""
    parser = common.parser(__doc__)
    parser.add_argument("--task", choices=("draw", "edit"), default="draw", help="from text alone, or from pictures")
    parser.add_argument("--pictures", type=int, nargs="+", help="how many are edited, one or more times [default: 1]")
    parser.add_argument("--size", type=int, nargs="+", default=[512], help="height and width in pixels, one or more")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant")
    parser.add_argument(
        "--contestant", nargs="+", default=("",), metavar="WORDS", help="those with all words of one [default: all]"
    )
    parser.add_argument("--memory", type=float, default=8, metavar="GIB", help="the most all may have together")
    parser.add_argument(
        "--stable-diffusion-cpp",
        type=Path,
        metavar="PROGRAM",
        help="its sd-cli: it takes part, and the model has a size that it was made for",
    )
    options = parser.parse_args()
    program = options.stable_diffusion_cpp and options.stable_diffusion_cpp.absolute()
    if program and not os.access(program, os.X_OK):
        parser.exit(2, f"{program} is no program\n")
    editing = options.task == "edit"
    if options.pictures and not editing:
        parser.error("--pictures is for --task edit")
    if program and editing:
        parser.error("stable-diffusion.cpp takes no part in --task edit")
    numbers = (options.pictures or [1]) if editing else [0]
    facts, results, names = common.machine(), [], chosen(options.contestant, program)
    for family in common.families(options):
        own = families.family(family)
        if editing and own.editing is None:
            print(f"{family} does not edit")
            continue
        configs = own.ggml_size if program else own.mid_size
        if configs is None:
            print(f"{family}: no size for stable-diffusion.cpp")
            continue
        configs = {**configs, **(own.editing.configs if editing and own.editing else {})}
        with (
            tempfile.TemporaryDirectory(prefix="zimg-cpu-peers-", dir=options.folder) as folder,
            patch.dict(os.environ, common.own_cache(Path(folder))),
        ):
            cpp = program and str(program)
            model = Settings(family, configs=configs, pictures=numbers[0], stable_diffusion_cpp=cpp)
            found = prepare(model, Path(folder), names)
            for size, pictures in product(options.size, numbers):
                settings = replace(model, size=size, pictures=pictures, steps=options.steps)
                results.append(found | race(settings, Path(folder), names, options.repeats, options.memory * 2**30))
                report(results[-1])
                common.save(options.json, facts, results)
    return int(any(result["failed"] for result in results))


if __name__ == "__main__":
    common.start(main)
