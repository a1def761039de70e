"""Every precision of one checkpoint: size, time of a denoising step on this CPU, and what it costs against float32.

By default mid-size random models; ``--model`` names a checkpoint. The step is timed in ONNX Runtime, in turns and on
the same inputs. The cost is that of ``zimg-export verify``; of mid-size models, one picture is drawn. Exits with 1
where INT8 of a mid-size model is not faster than float32.

    python benchmarks/precisions.py --json benchmarks/results/precisions.json
    python benchmarks/precisions.py --model zimg-tiny-z --judge 200 --sheet precisions.png
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import families
from lora_swap import write_checkpoint

PRECISIONS = ("fp32", "bf16", "fp8", "int8", "int8-dynamic", "int8-weights", "int4-weights")
MID_SIZE = 10**8
"""Models of fewer parameters spend their time elsewhere than in multiplying."""


def compare(
    checkpoint: str | Path,
    folder: Path,
    *,
    size: int | None,
    steps: int | None,
    repeats: int,
    prompts: Sequence[str] = (),
    precisions: Sequence[str] = PRECISIONS,
    judge: int = 0,
    sheet: Path | None = None,
) -> dict[str, Any]:
    """Build a checkpoint in every precision, and measure them all.

    Args:
        checkpoint: its folder or name.
        folder: an empty folder, on the same disk.
        size: height and width in pixels; the checkpoint's own default where None.
        steps: of each picture; the checkpoint's own default where None.
        repeats: how often a step is timed.
        prompts: of the pictures; by default those of ``zimg-export verify``.
        precisions: which, beside ``"fp32"`` and ``"bf16"``, which are always there.
        judge: on how many captions, of a demo model.
        sheet: a picture to make of the prompts' pictures, all precisions of one side by side.
    """
    import msgspec

    from zimgkit.engines.bundle import Bundle
    from zimgkit.export.build import Quantizing, build
    from zimgkit.export.quality.cost import References, baseline, measure
    from zimgkit.export.quality.judged import accuracy
    from zimgkit.export.quality.runs import Trial
    from zimgkit.export.quantization.calibrate import CalibrationSet, calibrate
    from zimgkit.runtime.commands.sheet import draw_sheet

    names = tuple(dict.fromkeys(("fp32", "bf16", *precisions)))
    with patch.dict(os.environ, common.own_cache(folder)):
        bundles = {name: build(str(checkpoint), folder / name, precision=name) for name in names[:2]}
        plan = CalibrationSet(sizes=((size, size),) if size else (), steps=steps)
        found = calibrate(bundles["bf16"], plan, folder / "calibration.safetensors")
        for name in names[2:]:
            settings = Quantizing(calibration=found)
            bundles[name] = build(str(checkpoint), folder / name, precision=name, quantization=settings)
        against = baseline(References(bundles["fp32"], bundles["bf16"]), Trial(tuple(prompts), size, size, steps))
        trial = against.trial
        seconds = time_steps(bundles, trial, repeats)
        results = {}
        for name, bundle in bundles.items():
            opened = Bundle.open(bundle.root, verify=False)
            denoiser = opened.component("denoiser")
            results[name] = {
                "bytes": sum(component.weight_bytes for component in opened.manifest.components.values()),
                "denoiser_bytes": denoiser.weight_bytes,
                "step_seconds": seconds[name],
            }
            if judge:
                results[name]["accuracy"] = accuracy(bundle.root, judge, "onnxruntime")
            if name != "fp32":
                results[name]["cost"] = msgspec.to_builtins(measure(opened, against).difference)
            print(f"  {name}: done", flush=True)
        if sheet:
            call = {"width": trial.width, "height": trial.height, "num_inference_steps": trial.steps, "seed": 0}
            draw_sheet(trial.prompts, sheet, call, bundles=[b.root for b in bundles.values()], columns=1)
    manifest = bundles["fp32"].manifest
    parameters = sum(component.parameters for component in manifest.components.values())
    settings = {"size": trial.width, "steps": trial.steps, "prompts": len(trial.prompts)}
    return {
        "name": manifest.name,
        "family": manifest.family,
        "parameters": parameters,
        **settings,
        "floor": msgspec.to_builtins(against.floor),
        "precisions": results,
    }


def time_steps(bundles: Mapping[str, Any], trial: Any, repeats: int) -> dict[str, list[float]]:
    """Time the first denoising step of the first picture, in turns: all bundles get the same inputs."""
    import numpy as np

    from zimgkit.engines.base import open_engine
    from zimgkit.runtime.pipeline import Pipeline

    first, fed = next(iter(bundles.values())), []

    def recording(bundle: Any, component: str, *where: Any) -> Any:
        engine = open_engine(bundle, component, *where)
        if component == "denoiser":
            run = engine.run

            def recorded(feeds: Any, keep: Any = ()) -> Any:
                hosted = {k: np.array(v) if isinstance(v, np.ndarray) else engine.download(v) for k, v in feeds.items()}
                fed.append(hosted)
                return run(feeds, keep)

            engine.run = recorded  # type: ignore[method-assign]
        return engine

    with Pipeline(first, opener=recording, warn=lambda _: None) as pipeline:
        pipeline(
            trial.prompts[0],
            height=trial.height,
            width=trial.width,
            num_inference_steps=1,
            seed=0,
            output_type="latent",
        )
    engines = {name: open_engine(bundle, "denoiser") for name, bundle in bundles.items()}
    seconds: dict[str, list[float]] = {name: [] for name in bundles}
    for turn in range(repeats + 1):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.run(fed[0])
            if turn:  # The first one does not count.
                seconds[name].append(time.perf_counter() - start)
    for engine in engines.values():
        engine.close()
    return seconds


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown has it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(result: Mapping[str, Any]) -> int:
    """Print a result; the exit code."""
    found = result["precisions"]
    median = {name: statistics.median(entry["step_seconds"]) for name, entry in found.items()}
    header = ["", "size", "of bf16", "step", "x fp32", "velocity off", "cosine", "PSNR", "SSIM"]
    judged = [f"right, {things} thing{'s' * (things == 'two')}" for things in found["fp32"].get("accuracy", ())]
    rows = []
    for name, entry in found.items():
        cost = entry.get("cost")
        size, share = f"{entry['bytes'] / 1e6:,.1f} MB", f"{entry['bytes'] / found['bf16']['bytes']:.0%}"
        speed = (f"{1e3 * median[name]:.1f} ms", f"{median['fp32'] / median[name]:.2f}")
        right = [f"{share:.1%}" for share in entry.get("accuracy", {}).values()]
        rows.append((name, size, share, *speed, *(_cost(cost) if cost else ("0", "1", "-", "1")), *right))
    rows.append(("bf16 arithmetic", "", "", "", "", *_cost(result["floor"]), *("" for _ in judged)))
    parameters = f"{result['parameters'] / 1e6:.0f} million parameters"
    pictures = f"{result['prompts']} pictures of {result['size']}x{result['size']} in {result['steps']} steps"
    print(f"\n{result['name']} ({result['family']}, {parameters}), {pictures}\n\n{markdown(header + judged, rows)}\n")
    if "int8" not in found or result["parameters"] < MID_SIZE:
        return 0
    return common.broken_bounds([("an INT8 step's share of a float32 step's time", median["int8"] / median["fp32"], 1)])


def _cost(cost: Mapping[str, Any]) -> tuple[str, str, str, str]:
    psnr = "-" if cost["psnr"] is None else f"{cost['psnr']:.1f} dB"
    return (
        f"{max(cost['velocity_relative']):.1e}",
        f"{min(cost['velocity_cosine']):.6f}",
        psnr,
        f"{cost['ssim']:.4f}",
    )


def main() -> int:
    """The script."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", help="a checkpoint's folder or name, in place of mid-size random ones")
    parser.add_argument("--size", type=int, help="height and width in pixels [default: 512, or the checkpoint's own]")
    parser.add_argument("--steps", type=int, help="[default: 4, or the checkpoint's own]")
    parser.add_argument("--judge", type=int, default=0, metavar="N", help="on N captions, of a demo model")
    parser.add_argument("--sheet", type=Path, help="draw the prompts in all precisions into that picture")
    parser.add_argument("--prompts", type=Path, help="one a line [default: those of zimg-export verify, or the first]")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, metavar="PRECISION")
    parser.add_argument("--repeats", type=int, default=5, help="how often a step is timed")
    options = parser.parse_args()
    import torch

    from zimgkit.export.quantization.prompts import cost_prompts

    torch.set_num_threads(common.machine()["cores"])
    prompts = options.prompts.read_text("utf-8").splitlines() if options.prompts else ()
    given = {"repeats": options.repeats, "prompts": prompts, "precisions": options.precisions}
    given |= {"judge": options.judge, "sheet": options.sheet}

    def compare_one(family: str | None, folder: Path) -> dict[str, Any]:
        if family is None:
            return compare(options.model, folder, size=options.size, steps=options.steps, **given)
        write_checkpoint(family, folder / "checkpoint", families.family(family).mid_size)
        first = {"prompts": prompts or cost_prompts(family)[:1]}
        size, steps = options.size or 512, options.steps or 4
        return compare(folder / "checkpoint", folder, size=size, steps=steps, **given | first)

    cases = [None] if options.model else common.families(options)
    return common.each(cases, options, compare_one, report)


if __name__ == "__main__":
    common.start(main)
