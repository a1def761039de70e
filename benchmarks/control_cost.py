"""What a ControlNet adds to a denoising step on the CPU: its time beside its operations, on mid-size random models.

The transformer has a third of its real width, the net is the largest kind of its family. A step with the net and one
without take turns, on ONNX Runtime in float32; what counts is the processor's time, and how much more the first takes.

    taskset -c 0 python benchmarks/control_cost.py                     # all families, at 512x512, on one core
    taskset -c 0 python benchmarks/control_cost.py --family FAMILY --size 1024 --repeats 5
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import clock
import common
import families
import flops
import random_checkpoint
from component_run import TOKENS, random_feeds

NET = "denoiser.control.net"
VARIANTS = ("denoiser", NET)


def compare(family: str, folder: Path, config: Mapping[str, Any], *, size: int, repeats: int) -> dict[str, Any]:
    """Time steps with a net and without.

    Args:
        family: its name.
        folder: an empty folder.
        config: of the transformer.
        size: height and width of the picture, in pixels.
        repeats: how many steps of each kind count, after one that does not.

    Returns:
        ``seconds``: component -> CPU seconds of each step; ``flops`` of a step without the net, ``added`` by it, and
        of these ``once``, those that could be done once for all steps; ``released``: these three of the real model
        at 1024x1024.
    """
    from sparse_checkpoint import write_holes

    from zimgkit.engines.base import open_engine
    from zimgkit.export.build import build
    from zimgkit.runtime.families import family_of

    random_checkpoint.write(family, folder / "checkpoint", dict(config))
    nets = folder / "checkpoint" / "controlnet"
    nets.mkdir()
    write_holes(nets / "net.safetensors", "bfloat16", families.family(family).control.shapes(config), 1)
    random_checkpoint.fill(nets)
    net = str(nets / "net.safetensors")
    bundle = build(str(folder / "checkpoint"), folder / "bundle", precision="fp32", controlnets=[net])
    lengths = {"batch": 1} | family_of(bundle.manifest).dynamic_dimensions(size, size, TOKENS)
    engines = {name: open_engine(bundle, name, "onnxruntime", "cpu") for name in VARIANTS}
    feeds = {name: random_feeds(bundle.component(name).inputs, lengths) for name in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(repeats + 1):
        for name in VARIANTS if turn % 2 else VARIANTS[::-1]:
            start = clock.now()
            engines[name].run(feeds[name])
            if turn:  # The first one does not count.
                seconds[name].append(clock.now().since(start).cpu_seconds)
    for engine in engines.values():
        engine.close()
    released = families.family(family).configs["transformer"]
    counts = {"released": operations(family, released, 1024)}
    return {"family": family, "size": size, "seconds": seconds} | operations(family, config, size) | counts


def operations(family: str, config: Mapping[str, Any], size: int) -> dict[str, int]:
    """Of a step without a net, ``flops``, and of what one adds, ``added`` and ``once``: see :func:`compare`."""
    added, once = flops.of_control(family, config, size, size, TOKENS)
    return {"flops": flops.of_step(family, config, size, size, TOKENS), "added": added, "once": once}


def report(result: Mapping[str, Any]) -> int:
    """Print a result; the exit code."""
    plain, controlled = (statistics.median(result["seconds"][name]) for name in VARIANTS)
    step, added = result["flops"], result["added"]
    rows = [
        ("a step", f"{step / 1e12:.3f}", f"{plain:.2f} s"),
        ("with a net", f"{(step + added) / 1e12:.3f}", f"{controlled:.2f} s"),
        ("more", f"{added / step:.1%}", f"{controlled / plain - 1:.1%}"),
    ]
    print(f"\n{result['family']}, {result['size']}x{result['size']}\n")
    print(common.table(("", "TFLOP", "CPU time"), rows))
    for size, count in ((result["size"], result), (1024, result["released"])):
        step, added, once = (count[key] for key in ("flops", "added", "once"))
        what = "the released model" if count is result["released"] else "this one"
        print(
            f"of {what} at {size}x{size} a net adds {added / 1e12:.2f} TFLOP to {step / 1e12:.2f}; "
            f"once for all steps could be done {once / added:.2%} of it, {once / (step + added):.3%} of a step"
        )
    return 0


def main() -> int:
    """The script."""
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels [default: 512]")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind that count [default: 5]")
    options = parser.parse_args()

    def compare_one(family: str, folder: Path) -> dict[str, Any]:
        config = random_checkpoint.transformer_config(family) | families.family(family).mid_size["transformer"]
        return compare(family, folder, config, size=options.size, repeats=options.repeats)

    return common.each(common.families(options), options, compare_one, report)


if __name__ == "__main__":
    common.start(main)
