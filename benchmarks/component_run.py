"""Open one component of a bundle and run it on random inputs, or draw a picture; a JSON line when something is done.

Started by ``full_size.py``, one process for each measurement.

    python benchmarks/component_run.py BUNDLE denoiser --backend onnxruntime --size 512
    python benchmarks/component_run.py BUNDLE picture --backend auto --size 512 --runs 8
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.base import Engine, open_engine
from zimgkit.engines.bundle import Bundle, TensorSpec
from zimgkit.engines.errors import ZimgError
from zimgkit.runtime.families import family_of

PICTURE = "picture"
"""What stands for all components."""
PROMPT = "a red circle left of a blue square"
TOKENS = 128
"""Of the prompt, template included."""
IDS = 256
"""Token ids below this are in every vocabulary."""


def random_feeds(
    inputs: Mapping[str, TensorSpec], dimensions: Mapping[str, int], seed: int = 0
) -> dict[str, NDArray[Any]]:
    """Inputs of a component, one picture: normal numbers, token ids, tables of one set of angles, and nothing padded.

    Args:
        inputs: of the component.
        dimensions: the sizes of its dynamic dimensions.
        seed: of the numbers.
    """
    feeds: dict[str, NDArray[Any]] = {}
    for name, spec in inputs.items():
        shape = tuple(dimensions[side] if isinstance(side, str) else side for side in spec.shape)
        generator = np.random.default_rng(seed)
        if spec.dtype == "bool":
            feeds[name] = np.zeros(shape, bool)
        elif spec.dtype == "int64":
            feeds[name] = generator.integers(IDS, size=shape, dtype=np.int64)
        elif name in ("cos", "sin"):
            feeds[name] = getattr(np, name)(generator.uniform(0, 2 * np.pi, shape)).astype(np.float32)
        else:
            feeds[name] = generator.standard_normal(shape, np.float32)
    return feeds


def all_finite(engine: Engine, outputs: Iterable[Any]) -> bool:
    """Whether no output has NaN or Inf."""
    arrays = (value if isinstance(value, np.ndarray) else engine.download(value) for value in outputs)
    return all(bool(np.isfinite(array).all()) for array in arrays)


def tell(event: str, **facts: Any) -> None:
    """Print what was done: when, on the clock that all processes share, and the CPU time of this one until then."""
    now = {"event": event, "time": time.monotonic(), "cpu": time.process_time()}
    print(json.dumps(now | facts), flush=True)


def run_component(options: argparse.Namespace) -> None:
    """Open a component, and run it as often as it is to be."""
    bundle = Bundle.open(options.bundle, verify=False)
    host = family_of(bundle.manifest)
    sizes = {"batch": 1} | host.dynamic_dimensions(options.size, options.size, TOKENS)
    feeds = random_feeds(bundle.component(options.component).inputs, sizes)
    tell("start")
    engine = open_engine(bundle, options.component, options.backend, "cpu")
    tell("opened")
    for _ in range(options.runs):
        outputs = engine.run(feeds)
        tell("ran", finite=all_finite(engine, outputs.values()))
    engine.close()


def draw(options: argparse.Namespace) -> None:
    """Draw a picture within the memory that there is, engines opened as the runtime plans it; NaN is an error of it."""
    from zimgkit.runtime import Pipeline  # Which would count in the memory of those that run a component.

    tell("start")
    pipeline = Pipeline.open(options.bundle, backend=options.backend, device="cpu", verify=False, warn=lambda _: None)
    tell("opened")
    pipeline(PROMPT, height=options.size, width=options.size, num_inference_steps=options.runs, seed=0)
    tell("ran", finite=True, took=pipeline.session.choice.backend)


def main() -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("component", help=f"its name, or {PICTURE}")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--size", type=int, required=True, help="height and width in pixels")
    parser.add_argument("--runs", type=int, default=1, help="of the component, or steps of the picture")
    parser.add_argument("--join", type=Path, help="the cgroup.procs of a control group to join first")
    options = parser.parse_args()
    if options.join:
        options.join.write_text("0")  # Which stands for whoever writes it.
    try:
        if options.component == PICTURE:
            draw(options)
        else:
            run_component(options)
    except ZimgError as error:
        tell("failed", error=" ".join(str(error).split()))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
