"""The contestants of ``cache.py``, each in a process of its own; and what they need made first.

    python benchmarks/cache_contestants.py FOLDER prepare
    python benchmarks/cache_contestants.py FOLDER zimg

FOLDER holds ``settings.json``. ``prepare`` adds a checkpoint and its bundle. A contestant draws a picture for each line
on standard input, the name of a cache, and answers with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import families
import numpy as np
from numpy.typing import NDArray

from zimgkit.runtime.diffusion.caching import PATTERNS, pattern

PROMPT = "A red circle left of a blue square, on a white table by a window; morning light, long shadows."
OFF = "off"
CACHES = (OFF, *(f"{name} {order}" for name in PATTERNS for order in (0, 1)))
"""Off, or a mask and the order of the extrapolation."""


@dataclass(frozen=True)
class Settings:
    """What the contestants have in common."""

    family: str
    size: int = 128
    """Height and width in pixels."""
    steps: int = 50
    layers: int | None = None
    """Of the transformer; as its config says where it is None."""

    def config(self) -> dict[str, Any]:
        """What makes the tests' tiny transformer deep."""
        own = families.family(self.family)
        return {**own.deep, **({own.depth: self.layers} if self.layers else {})}

    def save(self, folder: Path) -> None:
        """Write ``settings.json``."""
        (folder / "settings.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Settings:
        """Read ``settings.json``."""
        return cls(**json.loads((folder / "settings.json").read_text()))

    def call(self) -> dict[str, Any]:
        """What either pipeline is given; without guidance, so that a step is one forward."""
        from zimgkit.runtime.families import family as host_of

        unguided = {families.family(self.family).scale: host_of(self.family).guidance_scale(1.0)}
        size = {"height": self.size, "width": self.size}
        return {"prompt": PROMPT, "num_inference_steps": self.steps, "output_type": "np", **size, **unguided}

    def full(self, name: str) -> list[bool]:
        """Which steps a mask computes in full."""
        return [*pattern(*PATTERNS[name], self.steps)]


Array = NDArray[np.float32]
Draw = Callable[[str], tuple[Array, Array]]
"""From the name of a cache to a picture, (height, width, 3) from 0 to 1, and the last latents."""


def prepare(folder: Path) -> None:
    """Save a random checkpoint, and build its bundle in float32."""
    from zimgkit.export.build import build

    settings, reference = Settings.load(folder), common.reference()
    reference.save(reference.FAMILIES[settings.family](transformer=settings.config()), folder / "checkpoint")
    build(str(folder / "checkpoint"), folder / "bundle", precision="fp32", cut_denoiser=True)


def zimg(folder: Path) -> Draw:
    """The pipeline of zimgkit, on ONNX Runtime."""
    from zimgkit.runtime import Pipeline

    settings = Settings.load(folder)
    pipeline = Pipeline.open(folder / "bundle", backend="onnxruntime", verify=False)

    def draw(cache: str) -> tuple[Array, Array]:
        name, _, order = cache.partition(" ")
        cached = {"cache": name, "cache_order": int(order)} if order else {}
        seen: list[Array] = []

        def look(_: Any, __: int, ___: float, tensors: dict[str, Array]) -> None:
            seen[:] = [tensors["latents"]]

        image = pipeline(**settings.call(), **cached, seed=0, callback_on_step_end=look).images[0]
        return image, seen[0]

    return draw


def cache_dit(folder: Path) -> Draw:
    """The pipeline of diffusers, with DBCache of cache-dit: one block, and the masks of zimgkit."""
    import cache_dit as package
    import diffusers
    import torch

    settings = Settings.load(folder)
    kind = getattr(diffusers, families.family(settings.family).pipeline)
    pipeline = kind.from_pretrained(folder / "checkpoint", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def draw(cache: str) -> tuple[Array, Array]:
        name, _, order = cache.partition(" ")
        if order:
            config = package.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                max_warmup_steps=0,
                num_inference_steps=settings.steps,
                steps_computation_mask=[int(full) for full in settings.full(name)],
                steps_computation_policy="static",
                enable_separate_cfg=False,
            )
            taylor = package.TaylorSeerCalibratorConfig(taylorseer_order=1) if order == "1" else None
            package.enable_cache(pipeline, cache_config=config, calibrator_config=taylor)
        seen: list[Array] = []

        def look(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen[:] = [tensors["latents"].numpy().copy()]
            return tensors

        generator = torch.Generator("cpu").manual_seed(0)
        image = pipeline(**settings.call(), generator=generator, callback_on_step_end=look).images[0]
        if order:
            package.disable_cache(pipeline)
        return image, seen[0]

    return draw


CONTESTANTS: dict[str, Callable[[Path], Draw]] = {"zimg": zimg, "cache-dit": cache_dit}


def file_of(folder: Path, name: str, cache: str) -> Path:
    """Where a contestant writes its last picture and latents."""
    return folder / f"{name} {cache}.npz"


def take_part(folder: Path, name: str) -> None:
    """Draw a picture for each line; the first answer comes when it is open."""
    # What libraries print goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        draw = CONTESTANTS[name](folder)
        print(json.dumps({"open": True}), file=answers, flush=True)
        for line in sys.stdin:
            cache = line.strip()
            wall, cpu = time.perf_counter(), time.process_time()
            image, latents = draw(cache)
            taken = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
            if not np.isfinite(image).all():
                raise ArithmeticError("the picture is not finite")
            np.savez(file_of(folder, name, cache), image=image, latents=latents)
            print(json.dumps(taken), file=answers, flush=True)
    except Exception as error:
        failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(json.dumps({"failed": failed}), file=answers, flush=True)


def main() -> None:
    """The process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", choices=["prepare", *CONTESTANTS])
    options = parser.parse_args()
    prepare(options.folder) if options.name == "prepare" else take_part(options.folder, options.name)


if __name__ == "__main__":
    common.start(main)
