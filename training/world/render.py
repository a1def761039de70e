"""A dataset folder of the world: pictures and ``metadata.csv``."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from zimgkit.engines.bundle import atomic_folder
from zimgkit.runtime.pictures.control_maps import canny
from zimgkit.runtime.progress import Report, silent
from zimgkit.training.world.captions import caption, noun
from zimgkit.training.world.drawing import draw
from zimgkit.training.world.edits import edit_to_judge, edit_to_learn
from zimgkit.training.world.sampling import Size, Split, sample, with_concept
from zimgkit.training.world.scattered import SIDE, Box, box_of, scattered

METADATA = "metadata.csv"
LINES = "metadata.jsonl"
"""The table where rows have lists."""
COUNTS = (1, 2, 2, 3)
"""How many things pictures have whose edges are given, in turns: two are harder to tell apart than one is to draw."""


def write_dataset(
    folder: Path,
    count: int,
    *,
    seed: int = 0,
    split: Split = "train",
    size: Size | None = None,
    outlined: bool = False,
    concept: bool = False,
    overwrite: bool = False,
    report: Report = silent,
) -> None:
    """Write pictures as PNG and their captions; the folder is whole or absent.

    Args:
        folder: where; its ``metadata.csv`` has a row ``image,prompt`` for each picture, images as paths in the folder.
        count: how many pictures.
        seed: from 0; no two seeds share a scene's seed, and the first pictures do not depend on ``count``.
        split: ``"train"`` or ``"test"``; see :func:`zimgkit.training.world.sampling.sample`.
        size: (width, height) in pixels of all pictures; sizes vary if None.
        outlined: draw the outlines of things alone; captions do not tell it.
        concept: make one thing of every other picture the shape that the models are not taught; with the known ones
            beside it, an adapter learns its word, and not to draw it always.
        overwrite: replace a dataset that is there.
        report: called with (stage, done, total).

    Raises:
        OutputError: the folder exists or cannot be written, or the disk is full.
    """
    with atomic_folder(folder.expanduser().absolute(), overwrite=overwrite, known_by=METADATA) as work:
        (work / "images").mkdir()
        with (work / METADATA).open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("image", "prompt"))
            for index in range(count):
                scene = sample((seed << 32) + index, split, size=size)
                if concept and index % 2 == 0:
                    scene = with_concept(scene)
                name = f"images/{index:06}.png"
                draw(scene, outlined=outlined).save(work / name, compress_level=1)
                table.writerow((name, caption(scene)))
                report("drawing", index + 1, count)


def write_rows(
    folder: Path,
    count: int,
    row: Callable[[Path, int], dict[str, Any]],
    *,
    seed: int = 0,
    overwrite: bool = False,
    report: Report = silent,
) -> None:
    """Write a dataset whose rows name more than a picture: a line of JSON each; the folder is whole or absent.

    Args:
        folder: where.
        count: how many rows.
        row: called with the folder and a scene's seed; writes the pictures and gives the row's columns.
        seed: from 0; see :func:`write_dataset`.
        overwrite: replace a dataset that is there.
        report: called with (stage, done, total).

    Raises:
        OutputError: the folder exists or cannot be written, or the disk is full.
    """
    with atomic_folder(folder.expanduser().absolute(), overwrite=overwrite, known_by=LINES) as work:
        lines = []
        for index in range(count):
            lines.append(json.dumps(row(work, (seed << 32) + index), ensure_ascii=False))
            report("drawing", index + 1, count)
        (work / LINES).write_text("\n".join(lines) + "\n", encoding="utf-8")


def edges_row(split: Split) -> Callable[[Path, int], dict[str, Any]]:
    """Rows with a ``control_image``: the edges of the picture, whose caption tells no more than an order of things."""

    def row(folder: Path, seed: int) -> dict[str, Any]:
        scene = scattered(seed, split, count=COUNTS[seed % len(COUNTS)], ordered=True)
        picture = draw(scene)
        image, edges = _name(folder, "images", seed), _name(folder, "edges", seed)
        _save(picture, folder / image)
        _save(canny(picture), folder / edges)
        return {"image": image, "prompt": caption(scene), "control_image": edges}

    return row


def regions_row(split: Split) -> Callable[[Path, int], dict[str, Any]]:
    """Rows with ``eligen_entity_prompts`` and ``eligen_entity_masks``: a noun and a white box for each thing."""

    def row(folder: Path, seed: int) -> dict[str, Any]:
        scene = scattered(seed, split)
        image = _name(folder, "images", seed)
        _save(draw(scene), folder / image)
        masks = []
        for number, thing in enumerate(scene.things):
            masks.append(_name(folder, "masks", seed, f"-{number}"))
            _save(region(box_of(thing)), folder / masks[-1])
        nouns = [noun(thing, scene) for thing in scene.things]
        return {
            "image": image,
            "prompt": caption(scene),
            "eligen_entity_prompts": nouns,
            "eligen_entity_masks": masks,
        }

    return row


def edits_row(split: Split) -> Callable[[Path, int], dict[str, Any]]:
    """Rows whose prompt is an instruction, and whose ``edit_image`` are the one or two pictures that it speaks of."""

    def row(folder: Path, seed: int) -> dict[str, Any]:
        made = (edit_to_judge if split == "test" else edit_to_learn)(seed & 0xFFFFFFFFFF)
        image = _name(folder, "images", seed)
        _save(draw(made.after), folder / image)
        before = [_name(folder, "before", seed, f"-{number}") for number in range(len(made.before))]
        for name, scene in zip(before, made.before, strict=True):
            _save(draw(scene), folder / name)
        return {"image": image, "prompt": made.instruction, "edit_image": before}

    return row


def region(box: Box) -> Image.Image:
    """A mask, white within a box, of the size of scattered scenes."""
    mask = Image.new("L", (SIDE, SIDE))
    left, top, right, bottom = box
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return mask


def _name(folder: Path, kind: str, seed: int, end: str = "") -> str:
    (folder / kind).mkdir(exist_ok=True)
    return f"{kind}/{seed & 0xFFFFFFFF:06}{end}.png"


def _save(picture: Image.Image, path: Path) -> None:
    picture.save(path, compress_level=1)
