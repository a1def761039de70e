"""A page of rows of a dataset, drawn by a bundle: the pictures that a row gives, then what is drawn, then the image."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from zimgkit.runtime import Pipeline
from zimgkit.runtime.progress import Report, silent
from zimgkit.training.metadata import find_table, read_table
from zimgkit.training.pictures import open_picture

ROWS = 8
GAP = 4
"""Between pictures, in pixels."""
TEXTS = ("eligen_entity_prompts",)
"""Columns that hold no pictures."""
CALLED = {"controlnet_image": "control_image", "blockwise_controlnet_image": "control_image"}
"""Column -> the parameter of a call, where it has another name."""


def draw_page(
    bundle: str, data: Path, out: Path, columns: Collection[str], table: Path | None = None, report: Report = silent
) -> None:
    """Draw some rows of a dataset, evenly chosen, and write them side by side; their prompts go to ``<out>.txt``.

    Args:
        bundle: a folder, or the name of a carried one.
        data: the dataset's folder.
        out: a PNG file.
        columns: what the rows give beside image and prompt.
        table: by default the one in the folder.
        report: called with (stage, done, total).

    Raises:
        ZimgError: a row is broken, or the bundle cannot draw it.
    """
    entries = read_table(table or find_table(data), ("image", "prompt", *columns))
    chosen = [entries[index * len(entries) // ROWS] for index in range(min(ROWS, len(entries)))]
    strips: list[list[Image.Image]] = []
    with Pipeline.open(bundle) as pipeline:
        for number, (_, values) in enumerate(chosen):
            report("page", number, len(chosen))
            given = {name: _opened(data, name, values[name]) for name in columns}
            target = open_picture(data / str(values["image"]))
            call: dict[str, Any] = {CALLED.get(name, name): value for name, value in given.items()}
            call |= {"height": target.height // 16 * 16, "width": target.width // 16 * 16, "seed": number}
            call["negative_prompt"] = pipeline.bundle.manifest.defaults.negative_prompt
            drawn = pipeline(values["prompt"], **call).images[0]
            strips.append([*_pictures(given), drawn, target])
    _side_by_side(strips).save(out)
    out.with_suffix(".txt").write_text("".join(f"{values['prompt']}\n" for _, values in chosen), encoding="utf-8")


def _opened(data: Path, column: str, value: Any) -> Any:
    if column in TEXTS:
        return value
    if isinstance(value, list):
        return [open_picture(data / str(name)) for name in value]
    return open_picture(data / str(value))


def _pictures(given: Mapping[str, Any]) -> list[Image.Image]:
    found = [value for name, value in given.items() if name not in TEXTS]
    return [picture for value in found for picture in (value if isinstance(value, list) else [value])]


def _side_by_side(strips: list[list[Image.Image]]) -> Image.Image:
    """A column for each row of the dataset, its pictures from top to bottom."""
    width = max(picture.width for strip in strips for picture in strip)
    height = max(picture.height for strip in strips for picture in strip)
    tall = max(len(strip) for strip in strips)
    page = Image.new("RGB", (len(strips) * (width + GAP), tall * (height + GAP)), "white")
    for column, strip in enumerate(strips):
        for row, picture in enumerate(strip):
            # What is drawn, and the image, are the last in every column.
            page.paste(picture, (column * (width + GAP), (row + tall - len(strip)) * (height + GAP)))
    return page
