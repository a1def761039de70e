"""Whole pictures and components on the CPU: zimgkit in every precision and backend, and its peers, in turns in one run.

The models have a few hundred million random weights, and the VAEs have their real configs. All contestants draw from
one checkpoint on all cores: diffusers eager and compiled by torch.compile, in float32 and bfloat16, and zimgkit. Wall
and CPU seconds are taken; on a busy machine the latter are the ones to compare. OpenVINO by hand on an exported graph
is zimgkit's own openvino backend: the same graph and the same call. stable-diffusion.cpp takes no part: it rounds
widths of feed-forwards up to multiples of 256, so these mid-size shapes need its source patched.

    python benchmarks/cpu_peers.py
    python benchmarks/cpu_peers.py --family FAMILY --contestant diffusers "zimg int8" --steps 2 --repeats 3
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import common
import families
import numpy as np
from numpy.typing import NDArray

PROMPT = "A red circle left of a blue square, on a white table by a window; morning light, long shadows."

STEP = "denoising step"
COMPONENTS = ("text encoder", STEP, "VAE decoder")
WHOLE = "whole pipeline"


DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
PRECISIONS = ("fp32", "bf16", "int8", "int8-weights", "int4-weights")
BACKENDS = ("onnxruntime", "openvino", "torch")
REFERENCE = "diffusers fp32"
"""Whose pictures the others are compared with."""
BASE = "zimg fp32 onnxruntime"
"""Whose times are 1."""
CONTESTANTS = (
    *(f"{kind} {name}" for kind in ("diffusers", "torch.compile") for name in DTYPES),
    *(f"zimg {precision} {backend}" for precision in PRECISIONS for backend in BACKENDS),
)


class Spent(NamedTuple):
    """What something took."""

    seconds: float
    """Of the clock on the wall."""
    cpu_seconds: float
    """Of all threads of this process."""


def now() -> Spent:
    """The clocks."""
    return Spent(time.perf_counter(), time.process_time())


class Clock:
    """Adds up the time spent in wrapped functions, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, Spent] = defaultdict(lambda: Spent(0, 0))

    def time(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            start = now()
            try:
                return function(*arguments, **options)
            finally:
                end, before = now(), self.spent[name]
                self.spent[name] = Spent(before[0] + end[0] - start[0], before[1] + end[1] - start[1])

        return timed


Draw = Callable[[], NDArray[np.float32]]
Contestant = tuple[Draw, Clock]


def write_checkpoint(family: str, folder: Path, overrides: families.Configs) -> int:
    """Save a random checkpoint; how many parameters its text encoder, transformer and VAE have."""
    pipeline = common.reference().FAMILIES[family](**overrides)
    pipeline.save_pretrained(folder)
    modules = (pipeline.text_encoder, pipeline.transformer, pipeline.vae)
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def zimg(bundle: Path, backend: str, size: int, steps: int) -> Contestant:
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

    pipeline = Pipeline(Bundle.open(bundle, verify=False), backend=backend, opener=opened)
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


def diffusers(folder: Path, dtype: str, family: str, size: int, steps: int, *, compiled: bool) -> Contestant:
    """The pipeline of diffusers, its three networks compiled by ``torch.compile`` or not."""
    import diffusers as package
    import torch

    own = families.family(family)
    pipeline = getattr(package, own.pipeline).from_pretrained(folder, torch_dtype=getattr(torch, dtype))
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


def compare(
    family: str, folder: Path, overrides: families.Configs, names: Sequence[str], **settings: Any
) -> dict[str, Any]:
    """Write a checkpoint, build its bundles, and :func:`race` on them with these settings.

    Args:
        family: its name.
        folder: an empty folder.
        overrides: component -> what differs from the tests' tiny model.
        names: of :data:`CONTESTANTS`.
        settings: of the race.
    """
    model = folder / "checkpoint"
    with patch.dict(os.environ, common.own_cache(folder)):
        parameters = write_checkpoint(family, model, overrides)
        precisions = dict.fromkeys(name.split()[1] for name in names if name.startswith("zimg"))
        bundles = build_all(model, folder, list(precisions))
        return {"parameters": parameters} | race(family, model, bundles, names, **settings)


def build_all(model: Path, folder: Path, precisions: Sequence[str]) -> dict[str, Path]:
    """Build a checkpoint in these precisions; where inputs are quantized, after a calibration of one step."""
    from zimgkit.engines.bundle import Bundle
    from zimgkit.export.build import Quantizing, build
    from zimgkit.export.quantization.calibrate import FEWEST_PROMPTS, CalibrationSet, calibrate
    from zimgkit.export.quantization.prompts import calibration_prompts

    bundles, quantizing = {}, None
    for precision in precisions:
        if precision == "int8":
            floating = bundles.get("bf16") or build(str(model), folder / "float", precision="bf16").root
            prompts = calibration_prompts(floating.name)[:FEWEST_PROMPTS]
            plan = CalibrationSet(prompts=prompts, sizes=((256, 256),), steps=1)
            found = calibrate(Bundle.open(floating), plan, folder / "calibration.safetensors")
            quantizing = Quantizing(calibration=found)
        build(str(model), folder / precision, precision=precision, quantization=quantizing)
        bundles[precision] = folder / precision
    return bundles


def race(
    family: str,
    model: Path,
    bundles: Mapping[str, Path],
    names: Sequence[str],
    *,
    size: int = 512,
    steps: int = 4,
    repeats: int = 5,
) -> dict[str, Any]:
    """Let the contestants take turns.

    Args:
        family: its name.
        model: a checkpoint's folder, in float32.
        bundles: precision -> the bundle built from it.
        names: of :data:`CONTESTANTS`.
        size: height and width in pixels.
        steps: denoising steps, each of one forward.
        repeats: turns of each contestant, after one that does not count.

    Returns:
        ``seconds`` and ``cpu_seconds``: contestant -> component -> those of each turn; ``difference``: contestant ->
        the largest difference of its pixels, 0 ... 1, from those of diffusers in float32, where that takes part;
        ``failed``: contestant -> why it has no times.
    """
    makers = {}
    for name in names:
        kind, precision, *backend = name.split()
        if kind == "zimg":
            makers[name] = partial(zimg, bundles[precision], *backend, size, steps)
        else:
            compiled = kind == "torch.compile"
            makers[name] = partial(diffusers, model, DTYPES[precision], family, size, steps, compiled=compiled)
    # Without its cache on disk the modulation table is computed in every turn.
    with patch.dict(os.environ, {"ZIMG_CACHE_LIMIT": "0"}):
        ready, images, failed = _warm_up(makers)
        spent = _take_turns(ready, steps, repeats)
    reference = images.get(REFERENCE)
    differences = {
        name: float(np.abs(image - reference).max()) for name, image in images.items() if reference is not None
    }
    settings = {"family": family, "size": size, "steps": steps}
    return settings | spent | {"difference": differences, "failed": failed}


def _warm_up(
    makers: Mapping[str, Callable[[], Contestant]],
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
            if not name.startswith("torch.compile"):
                raise
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"  {name}: first picture after {time.perf_counter() - start:.0f} s", flush=True)
    return ready, images, failed


def _take_turns(ready: Mapping[str, Contestant], steps: int, repeats: int) -> dict[str, dict[str, dict[str, Any]]]:
    taken: dict[str, dict[str, dict[str, Any]]] = {
        kind: {name: defaultdict(list) for name in ready} for kind in Spent._fields
    }
    for turn in range(repeats):
        names = list(ready)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            draw, clock = ready[name]
            clock.spent.clear()
            start = now()
            draw()
            for index, kind in enumerate(Spent._fields):
                taken[kind][name][WHOLE].append(now()[index] - start[index])
                for component in COMPONENTS:
                    spent = clock.spent[component][index]
                    taken[kind][name][component].append(spent / steps if component == STEP else spent)
    return taken


def report(result: Mapping[str, Any]) -> None:
    """Print the medians, and how many times as fast as :data:`BASE` each is."""
    names = list(result["seconds"])
    turns = len(result["seconds"][names[0]][WHOLE])
    size = f"{result['parameters'] / 1e6:.0f} million parameters, {result['size']}x{result['size']} pixels"
    print(f"\n{result['family']}: {size}, {result['steps']} steps, {turns} turns each")
    for kind in Spent._fields:
        median = {
            name: {component: statistics.median(times) for component, times in found.items()}
            for name, found in result[kind].items()
        }
        base = median.get(BASE, median[names[0]])
        parts = (*COMPONENTS, WHOLE)
        rows = [
            [name, *(f"{found[part]:.3f} ({base[part] / found[part]:.2f})" for part in parts)]
            for name, found in median.items()
        ]
        header = f"{kind}, median (times as fast as {BASE if BASE in median else names[0]})"
        print(f"\n{common.table([header, *parts], rows)}")
    for name, difference in result["difference"].items():
        if name != REFERENCE:
            print(f"largest pixel difference of {name} from {REFERENCE}: {difference:.1e}")
    for name, reason in result["failed"].items():
        print(f"{name} did not run: {reason}")


def chosen(wanted: Sequence[str]) -> tuple[str, ...]:
    """The contestants whose names have all words of one of these; of backends, those that are installed.

    Raises:
        SystemExit: there is none.
    """
    installed = [name for name in CONTESTANTS if not name.endswith("openvino") or find_spec("openvino")]
    found = tuple(name for name in installed if any(set(one.split()) <= set(name.split()) for one in wanted))
    if not found:
        raise SystemExit(f"no contestant is called so; these are there: {', '.join(installed)}")
    return found


def main() -> None:
    """The script."""
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contestant")
    parser.add_argument(
        "--contestant", nargs="+", default=("",), metavar="WORDS", help="those with all words of one [default: all]"
    )
    options = parser.parse_args()
    facts, results, names = common.machine(), [], chosen(options.contestant)
    import torch

    torch.set_num_threads(facts["cores"])
    for family in common.families(options):
        with tempfile.TemporaryDirectory(prefix="zimg-cpu-peers-", dir=options.folder) as folder:
            result = compare(
                family,
                Path(folder),
                families.family(family).mid_size,
                names,
                size=options.size,
                steps=options.steps,
                repeats=options.repeats,
            )
        report(result)
        results.append(result)
        common.save(options.json, facts, results)


if __name__ == "__main__":
    common.start(main)
