"""The contestants of ``cpu_peers.py``, each in a process of its own; and what they need made first.

    python benchmarks/peer_contestants.py FOLDER prepare fp32 int8
    python benchmarks/peer_contestants.py FOLDER "zimg int8 onnxruntime"

FOLDER holds ``settings.json``. ``prepare`` adds a checkpoint and its bundles in these precisions. A contestant opens,
draws a picture, and then one for each line on standard input; it answers with a line of JSON each time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import patch

import common
import families
import numpy as np
import stable_diffusion_cpp
from clock import COMPONENTS, READERS, STEP, WHOLE, Clock, Spent
from numpy.typing import NDArray

PROMPT = "A red circle left of a blue square, on a white table by a window; morning light, long shadows."

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
VISION_PART = 7 / 8
"""The side that the vision encoder reads pictures at, of their own: so that of a multiple of 256 is whole patches."""


@dataclass(frozen=True)
class Settings:
    """What all contestants have in common."""

    family: str
    size: int = 512
    """Height and width in pixels."""
    steps: int = 4
    """Denoising steps, each of one forward."""
    pictures: int = 0
    """How many are edited, each of that height and width; none where a picture is drawn from text alone."""
    configs: families.Configs | None = None
    """Of the checkpoint: what differs from the tests' tiny model."""
    model: str | None = None
    """A checkpoint in float32; the one that ``prepare`` makes if not given."""
    bundles: str | None = None
    """The folder of its bundles, each called as its precision; likewise."""
    stable_diffusion_cpp: str | None = None
    """The program."""

    @property
    def components(self) -> tuple[str, ...]:
        """What is timed beside the whole."""
        return (*READERS, *COMPONENTS) if self.pictures else COMPONENTS

    @property
    def editing(self) -> families.Editing | None:
        """How the family edits, where it is to."""
        return families.family(self.family).editing if self.pictures else None

    @property
    def areas(self) -> tuple[int, int]:
        """Pixels that the vision encoder reads of a picture that is edited, and the VAE encoder."""
        return round(VISION_PART * self.size) ** 2, self.size**2

    def images(self) -> Iterator[dict[str, Any]]:
        """What calls have beside the prompt: pictures to edit that no call before had, or nothing."""
        from PIL import Image

        for turn in count():
            random = np.random.default_rng(turn)
            small = [Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(self.pictures)]
            yield {"image": [each.resize((self.size, self.size)) for each in small]} if small else {}

    def save(self, folder: Path) -> None:
        """Write ``settings.json``."""
        (folder / "settings.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Settings:
        """Read ``settings.json``."""
        settings = cls(**json.loads((folder / "settings.json").read_text()))
        where = {"model": settings.model or str(folder / "checkpoint"), "bundles": settings.bundles or str(folder)}
        return cls(**{**vars(settings), **where})


Draw = Callable[[], NDArray[np.float32]]
Contestant = tuple[Draw, Clock]
"""What draws a picture, (1, height, width, 3), 0 ... 1; and the clock of its components, and of all."""


def prepare(folder: Path, precisions: Sequence[str]) -> int:
    """Save a random checkpoint and build its bundles; how many parameters text encoder, transformer and VAE have."""
    settings = Settings.load(folder)
    reference, editing = common.reference(), settings.editing
    made = reference.FAMILIES[editing.reference if editing else settings.family]
    pipeline = made(**(settings.configs or {}))
    reference.save(pipeline, Path(str(settings.model)))
    modules = (pipeline.text_encoder, pipeline.transformer, pipeline.vae)
    parameters = sum(int(parameter.numel()) for module in modules for parameter in module.parameters())
    del pipeline, modules
    build_all(Path(str(settings.model)), Path(str(settings.bundles)), precisions)
    return parameters


def build_all(model: Path, folder: Path, precisions: Sequence[str]) -> None:
    """Build a checkpoint in these precisions; where inputs are quantized, after a calibration of one step."""
    from zimgkit.engines.bundle import Bundle
    from zimgkit.export.build import Quantizing, build
    from zimgkit.export.quantization.calibrate import FEWEST_PROMPTS, CalibrationSet, calibrate
    from zimgkit.export.quantization.prompts import calibration_prompts

    quantizing = None
    for precision in precisions:
        if precision == "int8":
            floating = folder / "bf16"
            if not floating.exists():
                build(str(model), floating, precision="bf16")
            prompts = calibration_prompts(floating.name)[:FEWEST_PROMPTS]
            plan = CalibrationSet(prompts=prompts, sizes=((256, 256),), steps=1)
            found = calibrate(Bundle.open(floating), plan, folder / "calibration.safetensors")
            quantizing = Quantizing(calibration=found)
        if not (folder / precision).exists():
            build(str(model), folder / precision, precision=precision, quantization=quantizing)


def contestant(folder: Path, name: str) -> Contestant:
    """Open one, by its name in ``cpu_peers.CONTESTANTS``."""
    settings = Settings.load(folder)
    kind, precision, *backend = name.split()
    if kind == "zimg":
        return zimg(settings, precision, *backend)
    if kind == "stable-diffusion.cpp":
        clock = Clock()
        program, model = Path(str(settings.stable_diffusion_cpp)), Path(str(settings.model))
        files = stable_diffusion_cpp.convert(program, model, folder, precision)
        # It has the tokenizer of the released models: here a word is a token, and in the random model a byte is.
        prompt = " ".join("a" for _ in PROMPT)

        def draw() -> NDArray[np.float32]:
            image, spent = stable_diffusion_cpp.draw(program, files, prompt, settings.size, settings.steps)
            for what, times in spent.items():
                clock.add(what, times)
            return image

        return draw, clock
    return diffusers(settings, DTYPES[precision], compiled=kind == "torch.compile")


def zimg(settings: Settings, precision: str, backend: str) -> Contestant:
    """The pipeline of zimgkit. What is done once for a prompt or a schedule counts to the steps."""
    import msgspec

    from zimgkit.engines.base import open_engine
    from zimgkit.engines.bundle import Bundle
    from zimgkit.runtime.families import family as host_of
    from zimgkit.runtime.pipeline import Pipeline

    clock = Clock()
    names = {name.lower().replace(" ", "_"): name for name in settings.components}

    def opened(bundle: Any, component: str, *where: Any) -> Any:
        engine = open_engine(bundle, component, *where)
        name = names.get(component.partition(".")[0], STEP)
        engine.run = clock.time(name, engine.run)  # type: ignore[method-assign]
        return engine

    bundle = Bundle.open(Path(str(settings.bundles)) / precision, verify=False)
    if (references := bundle.manifest.references) is not None:
        vision, latents = settings.areas
        smaller = msgspec.structs.replace(references, vision_area=vision, latents_area=latents)
        bundle = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, references=smaller))
    pipeline = Pipeline(bundle, backend=backend, opener=opened)
    host = host_of(bundle.manifest.family)
    scheduled = clock.time(STEP, host.schedule_inputs)
    call: dict[str, Any] = {"height": settings.size, "width": settings.size, "num_inference_steps": settings.steps}
    call |= {"guidance_scale": _unguided(host.NAME), "seed": 0, "output_type": "np"}
    given = settings.images()

    def draw() -> NDArray[np.float32]:
        # Without its cache on disk the modulation table is computed for every picture.
        with patch.object(host, "schedule_inputs", scheduled), patch.dict(os.environ, {"ZIMG_CACHE_LIMIT": "0"}):
            images: NDArray[np.float32] = pipeline(PROMPT, **next(given), **call).images
        return images

    return clock.time(WHOLE, draw), clock


def _unguided(family: str) -> float:
    """The guidance scale that is none, so that a step is one forward."""
    from zimgkit.runtime.families import family as host_of

    return host_of(family).guidance_scale(1.0)


def diffusers(settings: Settings, dtype: str, *, compiled: bool) -> Contestant:
    """The pipeline of diffusers, its three networks compiled by ``torch.compile`` or not."""
    import diffusers as package
    import torch

    own, editing = families.family(settings.family), settings.editing
    options: dict[str, Any] = {"torch_dtype": getattr(torch, dtype)}
    if editing is None:
        pipeline = getattr(package, own.pipeline).from_pretrained(settings.model, **options)
    else:
        kind = getattr(package, editing.pipeline)
        pipeline = common.reference().reading_pictures(kind.from_pretrained(settings.model, processor=None, **options))
        for name, area in zip(editing.areas, settings.areas, strict=True):
            setattr(sys.modules[kind.__module__], name, area)
    pipeline.set_progress_bar_config(disable=True)
    clock = Clock()
    if compiled:
        for network in (pipeline.text_encoder, pipeline.transformer, pipeline.vae.decoder):
            network.forward = torch.compile(network.forward)
    if editing is not None:
        tower = pipeline.text_encoder.model.visual
        tower.forward = clock.time("vision encoder", tower.forward, within="text encoder")
        pipeline.vae.encode = clock.time("VAE encoder", pipeline.vae.encode)
    pipeline.text_encoder.forward = clock.time("text encoder", pipeline.text_encoder.forward)
    pipeline.transformer.forward = clock.time(STEP, pipeline.transformer.forward)
    pipeline.vae.decode = clock.time("VAE decoder", pipeline.vae.decode)
    call: dict[str, Any] = {"height": settings.size, "width": settings.size, "num_inference_steps": settings.steps}
    call |= {own.scale: _unguided(settings.family), "output_type": "np"}
    given = settings.images()

    def draw() -> NDArray[np.float32]:
        generator = torch.Generator("cpu").manual_seed(0)
        images: NDArray[np.float32] = pipeline(prompt=PROMPT, generator=generator, **next(given), **call).images
        return images

    return clock.time(WHOLE, draw), clock


def image_file(folder: Path, name: str) -> Path:
    """Where a contestant writes its first picture."""
    return folder / f"{name}.npy"


def take_part(folder: Path, name: str, turns: Iterable[str], answers: TextIO) -> None:
    """Open a contestant, draw a picture, and then one for each of these lines.

    The first answer has ``opening_s`` and ``first_picture_s``. The others have ``seconds`` and ``cpu_seconds``: those
    of each component, of a single step, and of the whole picture.
    """

    def answer(**facts: Any) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    start = time.perf_counter()
    try:
        draw, clock = contestant(folder, name)
        opened = time.perf_counter()
        image = draw()
        first = time.perf_counter() - opened
        if not np.isfinite(image).all():
            raise ArithmeticError("the picture is not finite")
        np.save(image_file(folder, name), image)
        answer(opening_s=round(opened - start, 2), first_picture_s=round(first, 2))
        settings = Settings.load(folder)
        for _ in turns:
            clock.spent.clear()
            draw()
            each = {what: clock.spent[what] for what in (*settings.components, WHOLE)}
            each[STEP] = Spent(*(value / settings.steps for value in each[STEP]))
            answer(**{kind: {what: getattr(spent, kind) for what, spent in each.items()} for kind in Spent._fields})
    except Exception as error:
        answer(failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def main() -> None:
    """The process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("precisions", nargs="*")
    options = parser.parse_args()
    # What libraries print goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if options.name == "prepare":
        print(json.dumps({"parameters": prepare(options.folder, options.precisions)}), file=answers, flush=True)
        return
    take_part(options.folder, options.name, sys.stdin, answers)
    os._exit(0)  # Nothing is left to write, and some libraries take seconds to end.


if __name__ == "__main__":
    common.start(main)
