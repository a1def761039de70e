"""A dataset folder of the world: pictures and ``metadata.csv``."""

from __future__ import annotations

import csv
from pathlib import Path

from zimgkit.engines.bundle import atomic_folder
from zimgkit.runtime.progress import Report, silent
from zimgkit.training.world.captions import caption
from zimgkit.training.world.drawing import draw
from zimgkit.training.world.sampling import Size, Split, sample, with_concept

METADATA = "metadata.csv"


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
