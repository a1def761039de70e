"""The first steps at half the size: pictures of a trained model, how far they are off, what the judge says, their time.

The trained models are so small that a step's time hardly depends on the size; ``--family`` takes mid-size random ones
instead, whose pictures show nothing, and whose times are those of larger models. As ``guidance.py`` measures it.

    taskset -c 0 python benchmarks/progressive.py --json benchmarks/results/progressive.json
    taskset -c 0 python benchmarks/progressive.py --family z-image --size 512 --steps 8 --captions 1
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import families
from guidance import compare, report
from lora_swap import write_checkpoint

from zimgkit.export.build import build
from zimgkit.runtime import Pipeline, demo_models

SHARES = (0.0, 0.3, 0.4, 0.5, 0.6)


def main() -> int:
    """The script."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", action="append", help="of a trained model [default: those that zimgkit carries]")
    parser.add_argument("--captions", type=int, default=200, help="half of one thing, half of two")
    parser.add_argument("--steps", type=int, help="of each picture [default: the bundle's]")
    parser.add_argument("--size", type=int, help="height and width in pixels [default: the scene's]")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the steps at half the size")
    options = parser.parse_args()
    given = {"num_inference_steps": options.steps, "height": options.size, "width": options.size}
    call = {name: value for name, value in given.items() if value is not None}
    ways = {f"{share:.0%} of the steps": {"progressive": share} for share in options.shares}

    def compare_one(case: str, folder: Path) -> dict[str, Any]:
        model: str | Path = case
        if options.family:
            write_checkpoint(case, folder / "checkpoint", families.family(case).mid_size)
            model = build(str(folder / "checkpoint"), folder / "bundle", precision="fp32").root
        with Pipeline.open(model, backend="onnxruntime", warn=lambda _: None) as pipeline:
            found = compare(pipeline, ways, call, options.captions)
        return {"model": case, "captions": options.captions, "call": call, "ways": found}

    cases = (options.family,) if options.family else options.model or demo_models.NAMES
    return common.each(cases, options, compare_one, report)


if __name__ == "__main__":
    common.start(main)
