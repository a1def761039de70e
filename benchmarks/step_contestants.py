"""The contestants of ``gpu_steps.py``, each in a process of its own; and what they need made first.

    python benchmarks/step_contestants.py FOLDER prepare
    python benchmarks/step_contestants.py FOLDER build int8
    python benchmarks/step_contestants.py FOLDER step eager
    python benchmarks/step_contestants.py FOLDER picture "int8 tensorrt"

FOLDER holds ``settings.json``. ``prepare`` adds a checkpoint, the inputs, and the velocity in float32; ``build`` a
bundle; what is measured adds ``<what> <name>.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import families
import numpy as np
import random_checkpoint
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn

    from zimgkit.engines.bundle import Bundle

Array = NDArray[np.float32]

SIGMA = np.float32(0.75)
"""The noise level of the step: its time is exact in bfloat16 as well, in any family's units."""
FLOAT32 = "float32"
FLOATING = "bf16"
PRECISIONS = (FLOATING, "fp8", "int8", "int8-weights", "int4-weights")
BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx", "torch")
CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu"


@dataclass(frozen=True)
class Settings:
    """What all contestants have in common."""

    family: str
    height: int = 1024
    width: int = 1024
    tokens: int = 128
    device: str = "cuda"
    tiny: bool = False
    layers: int | None = None
    seed: int = 0
    warmup: int = 3
    repeats: int = 20
    steps: int = 50
    """Of a whole picture."""

    def config(self) -> dict[str, Any]:
        """Of the transformer."""
        return random_checkpoint.transformer_config(self.family, tiny=self.tiny, layers=self.layers)

    def save(self, folder: Path) -> None:
        """Write ``settings.json``."""
        (folder / "settings.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Settings:
        """Read ``settings.json``."""
        return cls(**json.loads((folder / "settings.json").read_text()))


@dataclass(frozen=True)
class Step:
    """One contestant, ready: latents go in from the host's memory, and the result comes back there."""

    run: Callable[[], Any]
    velocity: Callable[[Any], Array]
    """The result as a velocity in the form of the latents; not timed."""


def prepare(folder: Path) -> None:
    """Write the checkpoint and the inputs, and compute the velocity in float32."""
    from zimgkit.engines.tensors.dtypes import round_to
    from zimgkit.runtime.diffusion.noise import randn_tensor
    from zimgkit.runtime.families import family as family_named

    settings = Settings.load(folder)
    config = settings.config()
    family = family_named(settings.family)({**families.family(settings.family).configs, "transformer": config})
    card = _card(settings.device)
    random_checkpoint.write(settings.family, folder / "checkpoint", config, device=settings.device, seed=settings.seed)
    shape = (1, *family.noise_shape(settings.height, settings.width))
    # All contestants read these, and those in bfloat16 cannot hold more.
    latents = round_to(family.from_noise(randn_tensor(shape, settings.seed)), "bfloat16")
    width = config[families.family(settings.family).text_width]
    prompt_embeds = round_to(randn_tensor((settings.tokens, width), settings.seed + 1), "bfloat16")
    np.savez(folder / "inputs.npz", latents=latents, prompt_embeds=prompt_embeds)
    step = diffusers(folder, settings, FLOAT32)
    np.save(folder / "reference.npy", step.velocity(step.run()))
    (folder / "prepare.json").write_text(json.dumps(card))


def build_bundle(folder: Path, precision: str) -> None:
    """Build the checkpoint in a precision, its denoiser cut. Nothing is calibrated: inputs get synthetic ranges.

    One that is there stays.
    """
    from synthetic_statistics import synthetic

    from zimgkit.engines.bundle import Bundle
    from zimgkit.export.build import Quantizing, build
    from zimgkit.export.cli.options import CALIBRATED

    quantizing = None
    if (folder / precision).exists():
        return
    if precision in CALIBRATED:
        build_bundle(folder, FLOATING)
        quantizing = Quantizing(calibration=synthetic(Bundle.open(folder / FLOATING, verify=False)))
    model, out = str(folder / "checkpoint"), folder / precision
    build(model, out, precision=precision, quantization=quantizing, cut_denoiser=True)


def _card(device: str) -> dict[str, Any]:
    """What the driver says of the device.

    Raises:
        SystemExit: torch does not find it.
    """
    import torch

    if device == "cpu":
        return {}
    try:
        card = torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise SystemExit(f"torch {torch.__version__} finds no device {device}: {error}") from None
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,power.limit,clocks.max.sm",
        "--format=csv",
        "-i",
        f"GPU-{card.uuid}",
    ]
    return {
        "nvidia-smi": common.measure(query).output.splitlines() if shutil.which("nvidia-smi") else None,
        "card": card.name,
        "uuid": f"GPU-{card.uuid}",
        "capability": f"{card.major}.{card.minor}",
        "memory_bytes": card.total_memory,
        "cuda": torch.version.cuda,
    }


def diffusers(folder: Path, settings: Settings, precision: str = "bfloat16", *, compiled: bool = False) -> Step:
    """The transformer of diffusers, eager or compiled, or in float32 a block at a time."""
    import diffusers as package
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    own = families.family(settings.family)
    dtype, device = getattr(torch, precision), settings.device
    kind = getattr(package, settings.config()["_class_name"])
    transformer = kind.from_pretrained(folder / "checkpoint" / "transformer", torch_dtype=torch.bfloat16)
    transformer.eval().requires_grad_(False)
    if precision == FLOAT32:
        _visit(transformer, device)
    else:
        transformer.to(device)
    network = torch.compile(transformer, dynamic=False) if compiled else transformer
    inputs = np.load(folder / "inputs.npz")
    latents, prompt_embeds = (torch.from_numpy(inputs[name]) for name in ("latents", "prompt_embeds"))
    prompt_embeds = prompt_embeds.to(device, dtype)
    time_in = torch.tensor([own.time(SIGMA)], dtype=torch.float32, device=device)
    sides = (1, settings.height // 16, settings.width // 16)

    @torch.inference_mode()
    def run() -> Array:
        # In float32 a fused kernel may compute with TF32's ten bits.
        with sdpa_kernel(SDPBackend.MATH) if precision == FLOAT32 else nullcontext():
            out = own.forward(network, latents.to(device, dtype), time_in, prompt_embeds, sides)
            host: Array = out.float().cpu().numpy()
        return host

    return Step(run, own.velocity)


def _visit(transformer: nn.Module, device: str) -> None:
    """Let each block come to the device, in float32, for the time of its one forward: all of them might not fit."""
    import torch

    def come(module: nn.Module, _: Any) -> None:
        module.to(device, torch.float32)

    def leave(module: nn.Module, *_: Any) -> None:
        module.to("meta")

    for child in transformer.children():
        if isinstance(child, torch.nn.ModuleList):
            for block in child:
                block.register_forward_pre_hook(come)
                block.register_forward_hook(leave)
        else:
            child.to(device, torch.float32)
    for parameter in transformer.parameters(recurse=False):
        parameter.data = parameter.data.to(device, torch.float32)


@dataclass(frozen=True)
class Inputs:
    """What a step of a bundle takes."""

    constants: dict[str, Any]
    """What stays the same from step to step."""
    changing: dict[str, Any]
    family: Any
    latents: Array


def _inputs(folder: Path, settings: Settings, bundle: Bundle, backend: str) -> Inputs:
    """The conditioner runs once, on the backend."""
    from zimgkit.engines.base import open_engine
    from zimgkit.runtime.families import family_of

    family, given = family_of(bundle.manifest), np.load(folder / "inputs.npz")
    latents = given["latents"]
    conditioner = open_engine(bundle, "conditioner", backend, settings.device)
    (conditioning,) = conditioner.run(family.conditioner_inputs(given["prompt_embeds"])).values()
    conditioner.close()
    constants = family.denoiser_constants(conditioning, settings.tokens, settings.height, settings.width)
    changing = family.schedule_inputs(bundle, np.array([SIGMA]))(0) | family.denoiser_inputs(latents)
    return Inputs(constants, changing, family, latents)


def zimg(folder: Path, settings: Settings, precision: str, backend: str) -> Step:
    """The bundle on a backend; what stays the same is uploaded once."""
    from zimgkit.engines.base import open_engine
    from zimgkit.engines.bundle import Bundle

    bundle = Bundle.open(folder / precision, verify=False)
    given = _inputs(folder, settings, bundle, backend)
    engine = open_engine(bundle, "denoiser", backend, settings.device)
    feeds = {**engine.upload(given.constants), **given.changing}
    return Step(lambda: engine.run(feeds)["velocity"], lambda out: given.family.velocity(out, given.latents))


def cached(folder: Path, settings: Settings, precision: str, backend: str) -> Step:
    """A step that leaves the body out: its residual is that of the same step, so that the velocity can be compared."""
    from zimgkit.engines.base import open_engine
    from zimgkit.engines.bundle import Bundle

    bundle = Bundle.open(folder / precision, verify=False)
    given = _inputs(folder, settings, bundle, backend)
    pieces = [open_engine(bundle, name, backend, settings.device) for name in bundle.manifest.pieces("denoiser")]
    head, body, tail = pieces
    feeds = dict(given.changing)
    for piece in pieces:
        feeds |= piece.upload({name: value for name, value in given.constants.items() if name in piece.inputs})

    def run(piece: Any, known: dict[str, Any], keep: bool = True) -> dict[str, Any]:
        found: dict[str, Any] = piece.run({name: known[name] for name in piece.inputs}, piece.outputs if keep else ())
        return found

    first = feeds | run(head, feeds)
    residual = run(body, first)["residual"]
    body.close()
    feeds |= {"residual": residual, "older_residual": residual, "weights": np.array([1, 0], np.float32)}
    return Step(
        lambda: run(tail, feeds | run(head, feeds), keep=False)["velocity"],
        lambda out: given.family.velocity(out, given.latents),
    )


def picture(folder: Path, settings: Settings, precision: str, backend: str) -> dict[str, float]:
    """Seconds of a whole picture from the prompt's embeddings, by cache; after one of each that does not count."""
    from zimgkit.runtime.diffusion.caching import PATTERNS
    from zimgkit.runtime.families import family
    from zimgkit.runtime.pipeline import Pipeline

    host = family(settings.family)
    call = {"height": settings.height, "width": settings.width, "num_inference_steps": settings.steps, "seed": 0}
    call |= {"guidance_scale": host.guidance_scale(1.0), "output_type": "np"}
    embeds, found = np.load(folder / "inputs.npz")["prompt_embeds"][None], {}
    with Pipeline.open(folder / precision, backend=backend, device=settings.device, verify=False) as pipeline:
        for cache in ("off", *PATTERNS):
            for _ in range(2):
                start = time.perf_counter()
                image = pipeline(prompt_embeds=embeds, cache=cache, **call).images
                found[cache] = time.perf_counter() - start
            if not np.isfinite(image).all():
                raise ArithmeticError("the picture is not finite")
    return found


PEERS: dict[str, Callable[[Path, Settings], Step]] = {
    "eager": diffusers,
    "torch.compile": partial(diffusers, compiled=True),
}
"""Diffusers' transformer."""
CONTESTANTS = (*PEERS, *(f"{precision} {backend}" for precision in PRECISIONS for backend in BACKENDS))
"""Those, and what zimgkit has: a precision and what runs it."""
STEP, CACHED, PICTURE = "step", "cached", "picture"


def measures(name: str) -> tuple[str, ...]:
    """What is measured of a contestant."""
    return (STEP,) if name in PEERS else (STEP, CACHED, PICTURE)


def take_part(folder: Path, name: str, what: str = STEP) -> dict[str, Any]:
    """Measure a contestant.

    Args:
        folder: what :func:`prepare` and :func:`build_bundle` made.
        name: of :data:`CONTESTANTS`.
        what: of :func:`measures`.

    Returns:
        Of steps ``seconds`` of each, ``first_step_s`` from the start of loading to the end of the first one, and the
        error of the last velocity against float32: ``relative_l2`` and ``max_error``. Of pictures ``pictures``: cache
        -> seconds. ``clocks``: what the driver says right afterwards, where there is one.

    Raises:
        Exception: as the contestant fails.
        ArithmeticError: its velocity is not finite.
    """
    settings = Settings.load(folder)
    if what == PICTURE:
        return {"pictures": picture(folder, settings, *name.split()), "clocks": _clocks(settings)}
    start = time.perf_counter()
    if name in PEERS:
        step = PEERS[name](folder, settings)
    else:
        step = (zimg if what == STEP else cached)(folder, settings, *name.split())
    step.run()
    first = time.perf_counter() - start
    for _ in range(settings.warmup):
        step.run()
    seconds = []
    for _ in range(settings.repeats):
        start = time.perf_counter()
        out = step.run()
        seconds.append(time.perf_counter() - start)
    clocks, reference = _clocks(settings), np.load(folder / "reference.npy")
    return {"seconds": seconds, "first_step_s": first, "clocks": clocks} | error(step.velocity(out), reference)


def _clocks(settings: Settings) -> list[str] | None:
    """What the driver says of the clocks of all its cards now; None without a driver."""
    if settings.device == "cpu" or not shutil.which("nvidia-smi"):
        return None
    return common.measure(["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv"]).output.splitlines()


def error(velocity: Array, reference: Array) -> dict[str, float]:
    """How far a velocity is from the reference."""
    if velocity.shape != reference.shape:
        raise ArithmeticError(f"the velocity has the shape {velocity.shape}, and the reference {reference.shape}")
    difference = velocity.astype(np.float64) - reference
    norms = [math.sqrt(float(np.sum(np.square(values, dtype=np.float64)))) for values in (difference, reference)]
    if not all(map(math.isfinite, norms)):
        raise ArithmeticError("the velocity is not finite")
    return {"relative_l2": norms[0] / norms[1], "max_error": float(np.abs(difference).max())}


def main() -> None:
    """The process: what goes wrong is written down as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=["prepare", "build", STEP, CACHED, PICTURE])
    parser.add_argument("name", nargs="?", default="")
    options = parser.parse_args()
    if options.what == "prepare":
        prepare(options.folder)
        return
    if options.what == "build":
        build_bundle(options.folder, options.name)
        return
    try:
        result = take_part(options.folder, options.name, options.what)
    except Exception as failure:
        result = {"failed": f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"}
    result_file(options.folder, options.name, options.what).write_text(json.dumps(result))


def result_file(folder: Path, name: str, what: str) -> Path:
    """Where what was measured is written."""
    return folder / f"{what} {name}.json"


if __name__ == "__main__":
    common.start(main)
