"""A denoising step on ONNX Runtime where memory is short: without packed copies of weights, beside one with them.

Random models, mid-size or a few blocks of the real width, each way a session of its own, in turns on the same inputs;
CPU seconds. Exits with 1 where ``int8-weights``, whose kernel turns weights over in every run then, is slower than
float32 without copies.

    taskset -c 0 python benchmarks/in_place.py --json benchmarks/results/in_place.json
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import families
import numpy as np
from clock import now
from lora_swap import write_checkpoint
from random_checkpoint import transformer_config

from zimgkit.engines.bundle import Bundle
from zimgkit.engines.onnxruntime.engine import open_engine

PRECISIONS = ("fp32", "bf16", "int8-weights")
BOUND = 1.0


def ways_of(bundles: dict[str, Bundle]) -> dict[str, Bundle]:
    """Name -> the bundle, which says whether there are copies."""
    copies = {"copies": False, "in place": True}
    return {
        f"{precision}, {way}": replace(bundle, in_place=in_place)
        for precision, bundle in bundles.items()
        for way, in_place in copies.items()
    }


def compare(family: str, folder: Path, config: dict[str, Any], size: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Build a random checkpoint, and time a step in every way.

    Args:
        family: of the checkpoint.
        folder: an empty folder.
        config: overrides of its components' configs.
        size: height and width in pixels.
        tokens: of the prompt.
        repeats: steps of each way that count.

    Returns:
        ``seconds``: way -> CPU seconds of each step.
    """
    from zimgkit.export.build import build
    from zimgkit.runtime.families import family as host_of

    write_checkpoint(family, folder / "checkpoint", config)
    built = {name: build(str(folder / "checkpoint"), folder / name, precision=name) for name in PRECISIONS}
    bundles = {name: Bundle.open(bundle.root, verify=False) for name, bundle in built.items()}
    sizes = host_of(family).dynamic_dimensions(size, size, tokens) | {"batch": 1}
    random, feeds = np.random.default_rng(0), {}
    for name, spec in bundles["fp32"].component("denoiser").inputs.items():
        shape = [sizes[side] if isinstance(side, str) else side for side in spec.shape]
        feeds[name] = np.zeros(shape, bool) if spec.dtype == "bool" else random.standard_normal(shape, np.float32)
    seconds: dict[str, list[float]] = {}
    opened = {name: open_engine(bundle, "denoiser", "cpu") for name, bundle in ways_of(bundles).items()}
    for turn in range(repeats + 1):
        for name, engine in opened.items():
            start = now()
            engine.run(feeds)
            if turn:  # The first one packs.
                seconds.setdefault(name, []).append(now().since(start).cpu_seconds)
        print(f"  {turn}/{repeats}", flush=True)
    for engine in opened.values():
        engine.close()
    return {"family": family, "size": size, "tokens": tokens, "seconds": seconds}


def report(result: dict[str, Any]) -> int:
    """Print a table; whether the bound is broken."""
    median = {name: statistics.median(each) for name, each in result["seconds"].items()}
    rows = [(name, f"{each:.2f}", f"{median['fp32, in place'] / each:.2f}") for name, each in median.items()]
    print(f"\n{result['family']}, {result['size']}x{result['size']}\n")
    print(common.table(("", "CPU s", "x float32 in place"), rows))
    share = median["int8-weights, in place"] / median["fp32, in place"]
    return common.broken_bounds([("int8-weights in place, time beside that of float32 in place", share, BOUND)])


def main() -> int:
    """The script."""
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--tokens", type=int, default=96, help="of the prompt")
    parser.add_argument("--layers", type=int, help="so many blocks of the real width [default: the mid-size model]")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each that count")
    options = parser.parse_args()

    def one(family: str, folder: Path) -> dict[str, Any]:
        config = families.family(family).mid_size
        if options.layers:
            config = {"transformer": transformer_config(family, layers=options.layers)}
        return compare(family, folder, config, options.size, options.tokens, options.repeats)

    return common.each(common.families(options), options, one, report)


if __name__ == "__main__":
    common.start(main)
