"""Pictures to a LoRA, the whole way in one page: encoders describe them, and a generator makes matrices of that."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import zimgkit
from zimgkit.engines.bundle import MANIFEST, Bundle
from zimgkit.engines.errors import CheckpointError, OutputError, UsageError
from zimgkit.engines.files import replacing, temporary_folder
from zimgkit.engines.tensors.safetensors import write
from zimgkit.export.checkpoints.checkpoint import open_configs
from zimgkit.export.i2l.models import Model, read_dinov3, read_generator, read_siglip
from zimgkit.export.i2l.running import Place, opened, run
from zimgkit.export.networks import registry
from zimgkit.export.networks.dinov3 import tables
from zimgkit.export.networks.parts import Shapes, stored_shapes
from zimgkit.runtime import demo_models
from zimgkit.runtime.pictures.reading import read_picture
from zimgkit.runtime.pictures.squares import dino_patches, middle_square, siglip_patches
from zimgkit.runtime.progress import Report, silent

Matrices = dict[str, NDArray[np.float32]]
"""Key of a LoRA's file -> matrix."""


@dataclass(frozen=True)
class Base:
    """What a LoRA is for."""

    name: str
    family: str
    transformer: Shapes
    """Its tensors."""


@dataclass(frozen=True)
class Made:
    """A LoRA that was made."""

    path: Path
    base: str
    pictures: int
    rank: int
    modules: int


def make_lora(
    model: str,
    pictures: Sequence[Any],
    out: Path,
    *,
    generator: str | None = None,
    siglip: str | None = None,
    dinov3: str | None = None,
    revision: str | None = None,
    source: str = "huggingface",
    overwrite: bool = False,
    place: Place | None = None,
    report: Report = silent,
) -> Made:
    """Make a LoRA of pictures.

    Args:
        model: the bundle or the checkpoint that it is for; no weights of that are read.
        pictures: as :func:`zimgkit.runtime.pictures.reading.read_picture` takes them.
        out: the LoRA's file.
        generator: the file of what makes matrices, a folder, or one on a hub; the release's when None.
        siglip: likewise of the first encoder.
        dinov3: likewise of the second.
        revision: of the checkpoint, on the hub.
        source: the hub, ``"huggingface"`` or ``"modelscope"``.
        overwrite: replace a file that is there.
        place: where it runs; the best backend and device, and what memory is free, when None.
        report: called with (stage, done, total).

    Raises:
        ZimgError: whatever went wrong, in one line. Nothing is left behind then.
    """
    place, out = place or Place(), out.expanduser().absolute()
    _check_out(out, overwrite=overwrite)
    if not pictures:
        raise UsageError("no picture is given", "name one or more picture files")
    named = [f"picture {index + 1}" for index in range(len(pictures))]
    squares = [middle_square(read_picture(own, name), name) for own, name in zip(pictures, named, strict=True)]
    base = open_base(model, revision, source)
    row = registry.row(base.family)
    if not row.pictures_to_lora:
        others = [own.base for own in registry.FAMILIES.values() if own.pictures_to_lora]
        raise CheckpointError(f"nothing makes LoRAs of pictures for {base.family}", f"name {' or '.join(others)}")
    first = read_siglip(siglip or registry.PICTURE_ENCODERS["siglip"], source)
    second = read_dinov3(dinov3 or registry.PICTURE_ENCODERS["dinov3"], source)
    own = generator or row.generators.get(base.name, row.generators[row.base])
    width = first.config.hidden_size + second.config.hidden_size
    maker = read_generator(own, source, row.pictures_to_lora, base.transformer, width)
    try:
        with temporary_folder(out, "encoders") as folder:
            embeds = describe(first, second, squares, place, folder, report)
            matrices = generate(maker, embeds, place, folder, report)
        metadata = {
            "format": "pt",
            "base_model": base.name,
            "family": base.family,
            "pictures": str(len(pictures)),
            "made_by": f"zimgkit {zimgkit.__version__}",
        }
        with replacing(out) as part:
            shapes = {key: ("float32", matrix.shape) for key, matrix in matrices.items()}
            write(part, shapes, {key: [matrix] for key, matrix in matrices.items()}, metadata)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written ({error.strerror or error})", "check the path and its rights"
        ) from None
    return Made(out, base.name, len(pictures), maker.config.rank * len(pictures), len(matrices) // 2)


def open_base(model: str, revision: str | None, source: str) -> Base:
    """The bundle or checkpoint that a LoRA shall be for, by its configs alone.

    Raises:
        CheckpointError: there is none, or it is of no family that is served.
        BundleError: the bundle's manifest cannot be read.
        UsageError: a revision of a bundle.
    """
    root = Path(model).expanduser() if model.startswith("~/") else demo_models.locate(model)
    if os.path.lexists(root / MANIFEST):
        if revision is not None:
            raise UsageError(f"{model} is a bundle, which has no revisions", "leave --revision out")
        manifest = Bundle.read(root).manifest
        name, family, config = manifest.name, manifest.family, manifest.config.get("transformer", {})
    else:
        checkpoint = open_configs(model, revision=revision, source=source)
        name, family, config = checkpoint.name, checkpoint.family, checkpoint.config("transformer")
    return Base(name, family, stored_shapes(registry.parts(family, "transformer", config)))


def describe(
    siglip: Model,
    dinov3: Model,
    squares: Sequence[NDArray[np.uint8]],
    place: Place,
    folder: Path,
    report: Report = silent,
) -> NDArray[np.float32]:
    """What both encoders say of pictures, float32 (pictures, widths of both together); each is open in its turn.

    Args:
        siglip: the first encoder.
        dinov3: the second.
        squares: the pictures, uint8 (H, W, 3).
        place: where they run.
        folder: to write graphs into.
        report: called with (stage, done, total).
    """
    found = []
    first, second = siglip.config, dinov3.config
    side = math.isqrt(first.num_patches) * first.patch_size
    seen = [siglip_patches(own, side, first.patch_size) for own in squares]
    seen_again = [dino_patches(own, second.image_size, second.patch_size) for own in squares]
    rope = tables(second)
    jobs: tuple[tuple[Model, int, list[dict[str, NDArray[Any]]]], ...] = (
        (siglip, first.num_patches, [{"pixel_values": values} for values in seen]),
        (dinov3, second.tokens, [{"pixel_values": values} | rope for values in seen_again]),
    )
    for model, tokens, feeds in jobs:
        (own := folder / model.part.source).mkdir()
        widths = model.config.hidden_size, model.config.intermediate_size
        with opened(model, place, own, widths, tokens, report) as engine:
            results = run(engine, feeds, model.name, report)
        found.append(np.concatenate([result["picture_embeds"] for result in results]))
    return np.concatenate(found, axis=1)


def generate(
    model: Model, embeds: NDArray[np.float32], place: Place, folder: Path, report: Report = silent
) -> Matrices:
    """A LoRA of all pictures: their matrices side by side along the rank, each with its share of the change.

    Args:
        model: the generator.
        embeds: what :func:`describe` gives.
        place: where it runs.
        folder: to write its graph into.
        report: called with (stage, done, total).

    Returns:
        In DiffSynth's keys, float32: A is (pictures * rank, inputs), B (outputs, pictures * rank).
    """
    config, pictures = model.config, len(embeds)
    (own := folder / model.part.source).mkdir()
    largest = max(max(target.shape) for target in config.targets)
    with opened(model, place, own, (largest, config.rank * pictures), len(config.targets), report) as engine:
        (results,) = run(engine, [{"picture_embeds": embeds}], model.name, report)
    share, made = np.float32(1 / pictures), {}
    for target in config.targets:
        outputs, inputs = target.shape
        down = results[f"{target.name}.lora_A"].reshape(pictures * config.rank, inputs)
        up = results[f"{target.name}.lora_B"].reshape(pictures, outputs, config.rank)
        made[f"{target.name}.lora_A.default.weight"] = down * share
        made[f"{target.name}.lora_B.default.weight"] = up.transpose(1, 0, 2).reshape(outputs, pictures * config.rank)
    return made


def _check_out(out: Path, *, overwrite: bool) -> None:
    if out.suffix != ".safetensors":
        raise UsageError(f"{out} is no name of a LoRA", "let it end in .safetensors")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent} is no folder", "make it first")
    if out.exists() and (out.is_dir() or not overwrite):
        raise OutputError(f"{out} exists already", "name another file, or replace it with --overwrite")


def made_data(made: Made) -> Mapping[str, Any]:
    """What was made, for machines."""
    return {
        "path": str(made.path),
        "base": made.base,
        "pictures": made.pictures,
        "rank": made.rank,
        "modules": made.modules,
    }
