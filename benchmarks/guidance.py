"""Guidance in some steps only: pictures of a trained model, their time, how far they are off, what the judge says.

Each caption is drawn in every way in turn, so that all of them see the same load on the machine. Time is the
processor's; with one core (``taskset -c 0``) no thread waits by spinning, and it is exact.

    taskset -c 0 python benchmarks/guidance.py --json benchmarks/results/guidance.json
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
import numpy as np

from zimgkit.engines.bundle import TEXT_TO_IMAGE
from zimgkit.runtime import Pipeline, demo_models
from zimgkit.runtime.pictures.saving import to_pil
from zimgkit.runtime.request import check
from zimgkit.runtime.sigmas import sigmas_of
from zimgkit.training.judge import judge
from zimgkit.training.trials import trials

WAYS = {
    "all steps": (0.0, 1.0),
    "first 80 %": (0.0, 0.8),
    "first 60 %": (0.0, 0.6),
    "first 40 %": (0.0, 0.4),
    "without the first 20 %": (0.2, 1.0),
    "from 20 to 80 %": (0.2, 0.8),
    "last 40 %": (0.6, 1.0),
}
"""What is guided -> from which share of the steps to which."""


def interval(sigmas: Any, start: float, stop: float) -> dict[str, float]:
    """Between which noise levels these shares of a schedule's steps lie: half way to the steps beside them."""
    steps = len(sigmas) - 1
    first, last = round(start * steps), round(stop * steps)
    low = float(sigmas[last - 1] + sigmas[last]) / 2 if last < steps else 0.0
    high = float(sigmas[first - 1] + sigmas[first]) / 2 if first else 1.0
    return {"guidance_low": low, "guidance_high": high}


def ways_of(pipeline: Any, call: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arguments of each way."""
    session = pipeline.session
    request = check(pipeline.bundle.manifest, session.family, prompt="", **call)
    sigmas = sigmas_of(request, session.family, session.scheduler)
    found = {name: interval(sigmas, *shares) for name, shares in WAYS.items()}
    return {**found, "no step": {"guidance_scale": session.family.guidance_scale(1.0)}}


def compare(pipeline: Any, ways: Mapping[str, Mapping[str, Any]], call: Mapping[str, Any], captions: int) -> Any:
    """Draw held-out scenes in every way.

    Args:
        pipeline: of a trained model.
        ways: name -> arguments of a call; the first is what the others are compared with.
        call: arguments of all of them.
        captions: how many are drawn, half of them of one thing.

    Returns:
        Way -> the median of a picture's seconds; the median PSNR against the first way, None where it is the same; and
        the shares that the judge finds right, of one thing and of two.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    psnr: dict[str, list[float]] = {name: [] for name in ways}
    right: dict[str, dict[int, list[bool]]] = {name: {1: [], 2: []} for name in ways}
    negative = {"negative_prompt": pipeline.bundle.manifest.defaults.negative_prompt}
    for way in ways.values():  # What is opened and read with a first picture does not count.
        pipeline("", **(negative | call | way | {"num_inference_steps": 1}))
    for seed, trial in enumerate(trials(TEXT_TO_IMAGE, captions)):
        size, first = {"height": trial.scene.height, "width": trial.scene.width}, None
        for name, own in ways.items():
            start = time.process_time()
            (pixels,) = pipeline(trial.caption, seed=seed, output_type="np", **(size | negative | call | own)).images
            seconds[name].append(time.process_time() - start)
            first = pixels if first is None else first
            error = float(np.mean((pixels - first) ** 2))
            psnr[name].append(-10 * math.log10(error) if error else math.inf)
            right[name][len(trial.scene.things)].append(judge(to_pil(pixels[None])[0], trial.claims).right)
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "psnr": None if math.inf in psnr[name] else statistics.median(psnr[name]),
            "right": [statistics.mean(right[name][things]) for things in (1, 2) if right[name][things]],
        }
        for name in ways
    }


def report(result: Mapping[str, Any]) -> int:
    """Print a result; the exit code."""
    ways = result["ways"]
    whole = next(iter(ways.values()))["seconds"]
    rows = [
        (
            name,
            f"{whole / own['seconds']:.2f}",
            "-" if own["psnr"] is None else f"{own['psnr']:.1f} dB",
            *(f"{share:.1%}" for share in own["right"]),
        )
        for name, own in ways.items()
    ]
    print(f"\n{result['model']}, {result['captions']} captions, {result['call'] or 'as it is by default'}\n")
    print(common.table(("", "x as fast", "PSNR", "right, one thing", "two things"), rows), flush=True)
    return 0


def main() -> int:
    """The script."""
    parser = common.parser(__doc__, family=False)
    parser.add_argument("--model", action="append", help="of a trained model [default: those that zimgkit carries]")
    parser.add_argument("--captions", type=int, default=200, help="half of one thing, half of two")
    parser.add_argument("--steps", type=int, help="of each picture [default: the bundle's]")
    parser.add_argument("--cfg-scale", type=float, help="[default: the bundle's]")
    options = parser.parse_args()
    given = {"num_inference_steps": options.steps, "cfg_scale": options.cfg_scale}
    call = {name: value for name, value in given.items() if value is not None}

    def compare_one(model: str, folder: Path) -> dict[str, Any]:
        with Pipeline.open(model, backend="onnxruntime", warn=lambda _: None) as pipeline:
            found = compare(pipeline, ways_of(pipeline, call), call, options.captions)
        return {"model": model, "captions": options.captions, "call": call, "ways": found}

    return common.each(options.model or demo_models.NAMES, options, compare_one, report)


if __name__ == "__main__":
    common.start(main)
