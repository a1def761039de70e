"""``zimg-run sheet``: a page of pictures, one cell for each prompt; in a cell, one picture of each bundle.

The same seed goes to every picture, so what differs within a cell is the bundles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimgkit.engines.errors import UsageError
from zimgkit.runtime import demo_models
from zimgkit.runtime.pictures import saving as images
from zimgkit.runtime.pipeline import Pipeline
from zimgkit.runtime.progress import Report, silent

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont
    from PIL.ImageFont import ImageFont as BitmapFont

MOST_PROMPTS = 1000
GAP, MARGIN, TEXT = 4, 10, 14
"""Between pictures of a cell, around a cell, and the height of letters, in pixels."""
PAPER, INK, FRAME = (255, 255, 255), (60, 60, 60), (215, 215, 215)


def read_prompts(path: Path) -> list[str]:
    """The prompts in a text file: one a line; empty lines and lines that begin with ``#`` are left out.

    Raises:
        UsageError: there is no such file, it is no text in UTF-8, or holds no prompts or too many.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error})", "name a text file in UTF-8, one prompt a line") from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not 0 < len(prompts) <= MOST_PROMPTS:
        raise UsageError(f"{path} holds {len(prompts)} prompts", f"give 1 to {MOST_PROMPTS}, one a line")
    return prompts


def sheet(
    prompts: Sequence[str],
    output: Path,
    call: Mapping[str, Any],
    *,
    bundles: Sequence[Path],
    columns: int = 4,
    backend: str = "onnxruntime",
    device: str | None = None,
    report: Report = silent,
    warn: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Draw every prompt with every bundle, and save all pictures as one.

    Args:
        prompts: one for each cell.
        output: the file.
        call: parameters of :meth:`Pipeline.__call__` by name, None where one was not given.
        bundles: folders, or names of bundles that zimgkit carries.
        columns: cells side by side.
        backend: as for :meth:`Pipeline.open`.
        device: as for :meth:`Pipeline.open`.
        report: called with (stage, done, total).
        warn: called with what the user should know.

    Returns:
        ``path``, ``width``, ``height``, and for each bundle its name and the seconds its pictures took.

    Raises:
        ZimgError: whatever went wrong, in one line; no sheet is half-written.
    """
    if columns < 1:
        raise UsageError(f"columns is {columns}", "give 1 or more")
    images.check_target(output)
    given = {name: value for name, value in call.items() if value is not None}
    rows: list[list[Image]] = []
    made = []
    for bundle in bundles:
        started = time.perf_counter()
        with Pipeline.open(demo_models.locate(bundle), backend=backend, device=device, warn=warn) as pipeline:
            manifest = pipeline.bundle.manifest
            wanted = {"negative_prompt": manifest.defaults.negative_prompt} | given
            row = []
            for number, prompt in enumerate(prompts):
                report(manifest.name, number, len(prompts))
                row += pipeline(prompt, **wanted).images
            report(manifest.name, len(prompts), len(prompts))
        rows.append(row)
        made.append({"name": manifest.name, "seconds": round(time.perf_counter() - started, 3)})
    page = compose(prompts, list(zip(*rows, strict=True)), columns)
    images.save(page, output)
    return {"path": str(output), "width": page.width, "height": page.height, "bundles": made}


def compose(captions: Sequence[str], cells: Sequence[Sequence[Image]], columns: int) -> Image:
    """Lay pictures out in cells of equal size, each with its caption below.

    Args:
        captions: one for each cell; one that the font has no letters for is given as the cell's number.
        cells: the pictures of each, which stand side by side.
        columns: cells side by side.
    """
    from PIL import Image, ImageDraw

    font = _font()
    wide = max(sum(picture.width + GAP for picture in cell) - GAP for cell in cells)
    tall = max(picture.height for cell in cells for picture in cell)
    texts = [_wrap(_readable(text, number), font, wide) for number, text in enumerate(captions, start=1)]
    below = (max(len(lines) for lines in texts)) * (TEXT + 4)
    columns = min(columns, len(cells))
    across, down = wide + 2 * MARGIN, tall + below + 2 * MARGIN
    page = Image.new("RGB", (columns * across, -(-len(cells) // columns) * down), PAPER)
    pen = ImageDraw.Draw(page)
    for number, (cell, lines) in enumerate(zip(cells, texts, strict=True)):
        x, y = number % columns * across + MARGIN, number // columns * down + MARGIN
        for index, line in enumerate(lines):
            pen.text((x, y + tall + 4 + index * (TEXT + 4)), line, fill=INK, font=font)
        for picture in cell:
            page.paste(picture, (x, y))
            pen.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=FRAME)
            x += picture.width + GAP
    return page


def _font() -> FreeTypeFont | BitmapFont:
    from PIL import ImageFont

    return ImageFont.load_default(TEXT)


def _readable(text: str, number: int) -> str:
    """Pillow's own font has Latin letters only."""
    return text if text.isascii() else f"prompt {number}"


def _wrap(text: str, font: FreeTypeFont | BitmapFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines or [""]
