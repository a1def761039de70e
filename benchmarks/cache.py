"""Block caching: how much faster whole pictures are, and how far off, beside DBCache of cache-dit with the same masks.

The transformers have random weights; they are narrow, and as deep as the real ones, for depth is what a cache saves.
Text encoder and VAE are tiny, as theirs is a small share of many steps of a real model. zimgkit and diffusers are a
process each, and draw in turns. On a busy machine CPU seconds are the ones to compare.

Random weights say what is saved. What is lost they say little of: with --trained the models that come with zimgkit are
drawn with, and judged. Exits with 1 where ``balanced`` of zimgkit is not 2.0 times as fast as without a cache, or
``fast`` 2.8 times.

    PYTHONPATH=… python benchmarks/cache.py --json benchmarks/results/cache.json     # where cache-dit is installed
    python benchmarks/cache.py --trained --captions 300 --json benchmarks/results/cache-trained.json
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import numpy as np
from cache_contestants import CACHES, CONTESTANTS, OFF, Settings, file_of
from contestant_processes import Contestant, FailedError

from zimgkit.export.quality.similarity import psnr, relative_l2_error

WORKER = Path(__file__).with_name("cache_contestants.py")
BOUNDS = {"balanced": 2.0, "fast": 2.8}
"""How many times as fast zimgkit shall be with each mask."""


def race(folder: Path, settings: Settings, names: list[str], repeats: int) -> dict[str, Any]:
    """Let the contestants draw with every cache in turn.

    Args:
        folder: an empty folder.
        settings: what they have in common.
        names: of :data:`cache_contestants.CONTESTANTS`.
        repeats: turns, after pictures that do not count.

    Returns:
        ``settings``; ``contestants``: name -> cache -> ``seconds`` and ``cpu_seconds`` of each turn, and ``psnr`` and
        ``latents_relative`` beside the contestant's own picture without a cache; or ``failed``, why it has none.
    """
    settings.save(folder)
    common.run([sys.executable, WORKER, folder, "prepare"], common.own_cache(folder))
    found: dict[str, Any] = {name: defaultdict(lambda: defaultdict(list)) for name in names}
    opened = {name: Contestant([sys.executable, WORKER, folder, name], folder / f"{name}.log") for name in names}
    try:
        for name in names:
            try:
                opened[name].answer(_wait)
                for cache in CACHES[:2]:
                    _draw(opened[name], cache)  # With what is done once for a prompt, and once for a cache.
            except FailedError as error:
                found[name] = {"failed": str(error)}
        for turn in range(repeats):
            for cache in (*CACHES[turn % len(CACHES) :], *CACHES[: turn % len(CACHES)]):
                for name in (name for name in names if "failed" not in found[name]):
                    try:
                        taken = _draw(opened[name], cache)
                    except FailedError as error:
                        found[name] = {"failed": str(error)}
                        continue
                    for kind, value in taken.items():
                        found[name][cache][kind].append(round(value, 3))
                    print(f"  {turn + 1}/{repeats} {name} {cache}: {taken['cpu_seconds']:.2f} s of CPU", flush=True)
    finally:
        for contestant in opened.values():
            contestant.close()
    for name in (name for name in names if "failed" not in found[name]):
        for cache in CACHES:
            found[name][cache] |= errors(folder, name, cache)
    return {"settings": vars(settings), "contestants": found}


def _wait() -> None:
    """Nothing is watched meanwhile."""


def _draw(contestant: Contestant, cache: str) -> dict[str, Any]:
    contestant.ask(cache)
    return contestant.answer(_wait)


def errors(folder: Path, name: str, cache: str) -> dict[str, float | None]:
    """How far a contestant's picture and latents are from its own without a cache."""
    own, other = (np.load(file_of(folder, name, which)) for which in (cache, OFF))
    squared = float(np.mean((own["image"].astype(np.float64) - other["image"]) ** 2))
    return {"psnr": psnr(squared), "latents_relative": relative_l2_error(own["latents"], other["latents"])}


def speeds(figures: dict[str, Any], kind: str) -> dict[str, float]:
    """Cache -> how many times as fast as without, by the medians."""
    medians = {cache: statistics.median(figures[cache][kind]) for cache in CACHES}
    return {cache: medians[OFF] / median for cache, median in medians.items()}


def report(result: dict[str, Any]) -> int:
    """Print a table; whether a bound is broken."""
    settings, rows, bounds = result["settings"], [], []
    for name, figures in result["contestants"].items():
        if "failed" in figures:
            print(f"{name} did not run: {figures['failed']}")
            continue
        cpu, wall = speeds(figures, "cpu_seconds"), speeds(figures, "seconds")
        for cache in CACHES:
            own = figures[cache]
            error = "-" if own["psnr"] is None else f"{own['psnr']:.1f}"
            times = (f"{statistics.median(own[kind]):.2f}" for kind in ("cpu_seconds", "seconds"))
            rows.append((f"{name} {cache}", *times, f"{cpu[cache]:.2f}", f"{wall[cache]:.2f}", error,
                         f"{own['latents_relative']:.1e}"))  # fmt: skip
            if name == "zimg" and (least := BOUNDS.get(cache.split()[0])):
                bounds.append((f"{settings['family']} {cache}, time beside that without", 1 / cpu[cache], 1 / least))
    size = f"{settings['size']}x{settings['size']}, {settings['steps']} steps"
    print(f"\n{settings['family']}, {size}; beside each contestant's own pictures without a cache")
    header = ["", "CPU s", "wall s", "faster by CPU", "by wall", "PSNR dB", "latents off"]
    print(common.table(header, rows))
    return common.broken_bounds(bounds)


def trained(name: str, folder: Path, steps: int, captions: int) -> dict[str, Any]:
    """What masks cost a model that comes with zimgkit: those that are chosen for it, and the patterns.

    Args:
        name: of the model.
        folder: an empty folder.
        steps: of each picture.
        captions: how many pictures are judged with each mask.

    Returns:
        ``model``; ``masks``: name and order -> as ``zimg-export calibrate-cache`` writes it.
    """
    import msgspec

    from zimgkit.export.build import build
    from zimgkit.export.quality.caches import calibrate_cache
    from zimgkit.export.quality.runs import Trial

    bundle = build(name, folder / "bundle", precision="fp32", cut_denoiser=True)
    found = {}
    for order in (1, 0):
        # Extrapolation is what is recommended; the judge says of it whether pictures are right still.
        masks = calibrate_cache(bundle.root, Trial(steps=steps), order=order, captions=captions if order else 0)
        found |= {f"{key} {order}": msgspec.to_builtins(mask) for key, mask in masks.items()}
    return {"model": name, "masks": found}


def report_trained(result: dict[str, Any]) -> int:
    """Print a table; no bound is broken."""
    import msgspec

    from zimgkit.engines.bundle import CacheMask
    from zimgkit.runtime.commands.inspect import cache_lines

    masks = msgspec.convert(result["masks"], dict[str, CacheMask])
    print(f"\n{result['model']}", *cache_lines(masks), sep="\n")
    return 0


def main() -> int:
    """The script."""
    from zimgkit.runtime.demo_models import NAMES

    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--layers", type=int, help="of the transformer [default: 60]")
    parser.add_argument("--repeats", type=int, default=3, help="pictures of each that count")
    parser.add_argument(
        "--trained", action="store_true", help="the models that come with zimgkit, in place of random ones"
    )
    parser.add_argument(
        "--captions", type=int, default=300, help="how many pictures of these are judged with each mask"
    )
    options = parser.parse_args()
    if options.trained:
        return common.each(
            NAMES,
            options,
            lambda name, folder: trained(name, folder, options.steps, options.captions),
            report_trained,
        )
    names = [name for name in CONTESTANTS if name == "zimg" or find_spec(name.replace("-", "_"))]
    if len(names) < len(CONTESTANTS):
        print("cache-dit is not installed, and is left out: pip install cache-dit", flush=True)

    def one(family: str, folder: Path) -> dict[str, Any]:
        return race(folder, Settings(family, options.size, options.steps, options.layers), names, options.repeats)

    return common.each(common.families(options), options, one, report)


if __name__ == "__main__":
    common.start(main)
