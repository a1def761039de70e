"""ONNX Runtime with zimgkit against diffusers, eager and compiled, on the CPU: pipeline and components in one run.

The models have a few hundred million random weights, and the VAEs have their real configs. All contestants compute in
float32 from one checkpoint on all cores, and take turns.

    python benchmarks/cpu_vs_diffusers.py
    python benchmarks/cpu_vs_diffusers.py --family FAMILY --no-compile --steps 2 --repeats 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import families
import numpy as np
from numpy.typing import NDArray

PROMPT = "A red circle left of a blue square, on a white table by a window; morning light, long shadows."

STEP = "denoising step"
COMPONENTS = ("text encoder", STEP, "VAE decoder")
WHOLE = "whole pipeline"


class Clock:
    """Adds up the seconds spent in wrapped functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def time(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return timed


Draw = Callable[[], NDArray[np.float32]]
Contestant = tuple[Draw, Clock]


def write_checkpoint(family: str, folder: Path, overrides: families.Configs) -> int:
    """Save a random checkpoint; how many parameters its text encoder, transformer and VAE have."""
    pipeline = common.reference().FAMILIES[family](**overrides)
    pipeline.save_pretrained(folder)
    modules = (pipeline.text_encoder, pipeline.transformer, pipeline.vae)
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def zimg(bundle: Path, size: int, steps: int) -> Contestant:
    """The pipeline of zimgkit. What is done once for a prompt or a schedule counts to the steps."""
    from zimgkit.engines.base import open_engine
    from zimgkit.engines.bundle import Bundle
    from zimgkit.runtime.families import family as host_of
    from zimgkit.runtime.pipeline import Pipeline

    clock = Clock()
    names = {"text_encoder": "text encoder", "vae_decoder": "VAE decoder"}
    call = {"height": size, "width": size, "num_inference_steps": steps, "seed": 0, "output_type": "np"}

    def opened(bundle: Any, component: str, *where: Any) -> Any:
        engine = open_engine(bundle, component, *where)
        engine.run = clock.time(names.get(component, STEP), engine.run)  # type: ignore[method-assign]
        return engine

    pipeline = Pipeline(Bundle.open(bundle), opener=opened)
    host = host_of(pipeline.bundle.manifest.family)
    scheduled = clock.time(STEP, host.schedule_inputs)

    def draw() -> NDArray[np.float32]:
        with patch.object(host, "schedule_inputs", scheduled):
            images: NDArray[np.float32] = pipeline(PROMPT, guidance_scale=_unguided(host.NAME), **call).images
        return images

    return draw, clock


def _unguided(family: str) -> float:
    """The guidance scale that is none, so that a step is one forward."""
    from zimgkit.runtime.families import family as host_of

    return host_of(family).guidance_scale(1.0)


def diffusers(folder: Path, family: str, size: int, steps: int, *, compiled: bool) -> Contestant:
    """The pipeline of diffusers, its three networks compiled by ``torch.compile`` or not."""
    import diffusers as package
    import torch

    own = families.family(family)
    pipeline = getattr(package, own.pipeline).from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    clock = Clock()
    if compiled:
        for network in (pipeline.text_encoder, pipeline.transformer, pipeline.vae.decoder):
            network.forward = torch.compile(network.forward)
    pipeline.text_encoder.forward = clock.time("text encoder", pipeline.text_encoder.forward)
    pipeline.transformer.forward = clock.time(STEP, pipeline.transformer.forward)
    pipeline.vae.decode = clock.time("VAE decoder", pipeline.vae.decode)
    call = {"height": size, "width": size, "num_inference_steps": steps, "output_type": "np"}
    call[own.scale] = _unguided(family)

    def draw() -> NDArray[np.float32]:
        images: NDArray[np.float32] = pipeline(PROMPT, generator=torch.Generator("cpu").manual_seed(0), **call).images
        return images

    return draw, clock


def compare(family: str, folder: Path, overrides: families.Configs, **settings: Any) -> dict[str, Any]:
    """Write a checkpoint, build its bundle, and :func:`race` on them with these settings.

    Args:
        family: its name.
        folder: an empty folder.
        overrides: component -> what differs from the tests' tiny model.
        settings: of the race.
    """
    from zimgkit.export.build import build

    model, bundle = folder / "checkpoint", folder / "bundle"
    with patch.dict(os.environ, common.own_cache(folder)):
        parameters = write_checkpoint(family, model, overrides)
        build(str(model), bundle, precision="fp32")
        return {"parameters": parameters} | race(family, model, bundle, **settings)


def race(
    family: str,
    model: Path,
    bundle: Path,
    *,
    size: int = 512,
    steps: int = 4,
    repeats: int = 3,
    compiled: bool = True,
) -> dict[str, Any]:
    """Let the contestants take turns.

    Args:
        family: its name.
        model: a checkpoint's folder, in float32.
        bundle: the bundle built from it, in float32.
        size: height and width in pixels.
        steps: denoising steps, each of one forward.
        repeats: turns of each contestant, after one that does not count.
        compiled: whether ``torch.compile`` takes part.

    Returns:
        ``seconds``: contestant -> component -> the seconds of each turn; ``difference``: contestant -> the largest
        difference of its pixels, 0 ... 1, from those of eager diffusers; ``failed``: contestant -> why it has no times.
    """
    makers = {
        "diffusers": partial(diffusers, model, family, size, steps, compiled=False),
        "zimg": partial(zimg, bundle, size, steps),
        "torch.compile": partial(diffusers, model, family, size, steps, compiled=True),
    }
    if not compiled:
        del makers["torch.compile"]
    # Without its cache on disk the modulation table is computed in every turn.
    with patch.dict(os.environ, {"ZIMG_CACHE_LIMIT": "0"}):
        ready, images, failed = _warm_up(makers)
        seconds = _take_turns(ready, steps, repeats)
    differences = {name: float(np.abs(image - images["diffusers"]).max()) for name, image in images.items()}
    settings = {"family": family, "size": size, "steps": steps}
    return settings | {"seconds": seconds, "difference": differences, "failed": failed}


def _warm_up(
    makers: dict[str, Callable[[], Contestant]],
) -> tuple[dict[str, Contestant], dict[str, NDArray[np.float32]], dict[str, str]]:
    """Each contestant's first picture, which compiles what is to be compiled; why a compiler failed."""
    ready, images, failed = {}, {}, {}
    for name, make in makers.items():
        start = time.perf_counter()
        try:
            draw, clock = make()
            images[name] = draw()
            ready[name] = draw, clock
        except Exception as error:
            if name != "torch.compile":
                raise
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"  {name}: first picture after {time.perf_counter() - start:.0f} s", flush=True)
    return ready, images, failed


def _take_turns(ready: dict[str, Contestant], steps: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    seconds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in ready}
    for turn in range(repeats):
        names = list(ready)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            draw, clock = ready[name]
            clock.seconds.clear()
            start = time.perf_counter()
            draw()
            seconds[name][WHOLE].append(time.perf_counter() - start)
            for component in COMPONENTS:
                spent = clock.seconds[component]
                seconds[name][component].append(spent / steps if component == STEP else spent)
    return seconds


def report(result: dict[str, Any]) -> None:
    """Print the medians, and how many times faster zimgkit is than each."""
    median = {
        name: {component: statistics.median(turns) for component, turns in times.items()}
        for name, times in result["seconds"].items()
    }
    others = [name for name in median if name != "zimg"]
    header = ["seconds (median)", "zimg", *others, *(f"{name} / zimg" for name in others)]
    rows = []
    for component in (*COMPONENTS, WHOLE):
        own = median["zimg"][component]
        times = [median[name][component] for name in others]
        rows.append([component, *(f"{time:.3f}" for time in (own, *times)), *(f"{time / own:.2f}x" for time in times)])
    turns = len(result["seconds"]["zimg"][WHOLE])
    size = f"{result['parameters'] / 1e6:.0f} million parameters, {result['size']}x{result['size']} pixels"
    print(f"\n{result['family']}: {size}, {result['steps']} steps, {turns} turns each")
    print(common.table(header, rows))
    for name, difference in result["difference"].items():
        if name != "diffusers":
            print(f"largest pixel difference of {name} from diffusers: {difference:.1e}")
    for name, reason in result["failed"].items():
        print(f"{name} did not run: {reason}")


def main() -> None:
    """The script."""
    parser = common.parser(__doc__, folder=False)
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contestant")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="let torch.compile take part"
    )
    options = parser.parse_args()
    facts, results = common.machine(), []
    import torch

    torch.set_num_threads(facts["cores"])
    for family in common.families(options):
        with tempfile.TemporaryDirectory(prefix="zimg-cpu-vs-diffusers-") as folder:
            result = compare(
                family,
                Path(folder),
                families.family(family).mid_size,
                size=options.size,
                steps=options.steps,
                repeats=options.repeats,
                compiled=options.compile,
            )
        report(result)
        results.append(result)
    common.save(options.json, facts, results)


if __name__ == "__main__":
    common.start(main)
