"""Quantized bundles of the tiny checkpoints, and what an engine is given on the way to a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from zimgkit.engines.base import Handle, open_engine
from zimgkit.engines.bundle import Bundle
from zimgkit.export.quantization.calibrate import CalibrationSet
from zimgkit.runtime.pipeline import Pipeline

PROMPTS = ("a red cube", "two small blue dogs on a hill", "山水", "the word OPEN in neon")
PLAN = CalibrationSet(PROMPTS, ((64, 64), (64, 96)), 2)
PRECISIONS = ("fp8", "int8", "int8-dynamic", "int8-weights", "int4-weights")


class Recorder:
    """Keeps what a component's engine is given and gives back."""

    def __init__(self, component: str) -> None:
        self.component = component
        self.runs: list[tuple[dict[str, Any], Any]] = []

    def __call__(self, bundle: Bundle, component: str, backend: str, device: str | None) -> Any:
        """Open an engine, as a pipeline's ``opener``."""
        engine = open_engine(bundle, component, backend, device)
        if component == self.component:
            run = engine.run

            def recorded(feeds: Any, keep: Any = ()) -> Any:
                result = run(feeds, keep)
                arrays = {
                    name: engine.download(value) if isinstance(value, Handle) else np.array(value)
                    for name, value in {**feeds, **result}.items()
                }
                self.runs.append(({name: arrays[name] for name in feeds}, *[arrays[name] for name in result]))
                return result

            engine.run = recorded  # type: ignore[method-assign]
        return engine


def record(bundle: Path, component: str, prompt: str = "a green ball") -> list[tuple[dict[str, Any], Any]]:
    """Every run of a component's engine on the way to one picture: what it was given, and its result."""
    recorder = Recorder(component)
    with Pipeline(Bundle.open(bundle), opener=recorder, warn=lambda _: None) as pipeline:
        pipeline(prompt, height=64, width=64, num_inference_steps=3, seed=5, output_type="latent")
    return recorder.runs


def replay(bundle: Path, component: str, backend: str, runs: list[tuple[dict[str, Any], Any]]) -> list[Any]:
    """The results of another bundle's engine on the same inputs."""
    engine = open_engine(Bundle.open(bundle), component, backend, "cpu")
    return [next(iter(engine.run(feeds).values())) for feeds, _ in runs]


def cosine(found: Any, expected: Any) -> float:
    """Of two arrays."""
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def relative(found: Any, expected: Any) -> float:
    """The norm of the difference over that of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
