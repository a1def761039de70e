"""Pictures and their captions laid out on one page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from zimgkit.runtime.pictures.fonts import Run, default, runs

if TYPE_CHECKING:
    from PIL.Image import Image

GAP, MARGIN, TEXT = 4, 10, 14
"""Between pictures of a cell, around a cell, and the height of letters, in pixels."""
PAPER, INK, FRAME = (255, 255, 255), (60, 60, 60), (215, 215, 215)
IDEOGRAPHS = "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uffef"
WORD = re.compile(f"[{IDEOGRAPHS}]|[^\\s{IDEOGRAPHS}]+|\\s+")
"""What stays on one line."""


def compose(captions: Sequence[str], cells: Sequence[Sequence[Image]], columns: int) -> Image:
    """Lay pictures out in cells of equal size, each with its caption below.

    Args:
        captions: one for each cell; those of :func:`numbered` are given as the cell's number.
        cells: the pictures of each, which stand side by side.
        columns: cells side by side.
    """
    from PIL import Image, ImageDraw

    wide = max(sum(picture.width + GAP for picture in cell) - GAP for cell in cells)
    tall = max(picture.height for cell in cells for picture in cell)
    unreadable = numbered(captions)
    shown = [unreadable.get(number, text) for number, text in enumerate(captions, start=1)]
    texts = [list(_lines(text, wide)) for text in shown]
    below = (max(len(lines) for lines in texts)) * (TEXT + 4)
    columns = min(columns, len(cells))
    across, down = wide + 2 * MARGIN, tall + below + 2 * MARGIN
    page = Image.new("RGB", (columns * across, -(-len(cells) // columns) * down), PAPER)
    pen = ImageDraw.Draw(page)
    ascent = default(TEXT).getmetrics()[0]
    for number, (cell, lines) in enumerate(zip(cells, texts, strict=True)):
        x, y = number % columns * across + MARGIN, number // columns * down + MARGIN
        for index, line in enumerate(lines):
            start, baseline = float(x), y + tall + 4 + index * (TEXT + 4) + ascent
            for text, font in line:
                pen.text((start, baseline), text, fill=INK, font=font, anchor="ls")
                start += font.getlength(text)
        for picture in cell:
            page.paste(picture, (x, y))
            pen.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=FRAME)
            x += picture.width + GAP
    return page


def numbered(captions: Sequence[str]) -> dict[int, str]:
    """Captions that no font here can show: the number of each, from 1, and what stands in its place."""
    return {n: f"prompt {n}" for n, text in enumerate(captions, start=1) if runs(_on_one_line(text), TEXT) is None}


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _lines(text: str, width: int) -> Iterator[tuple[Run, ...]]:
    """The lines of a caption, each as pieces with their fonts."""
    line = ""
    for word in WORD.findall(_on_one_line(text)):
        # A word that is wider than the cell is broken.
        for piece in [word] if _length(word) <= width else word:
            if line and _length(line + piece) > width:
                yield runs(line.rstrip(), TEXT) or ()
                line = ""
            line += piece if line or piece != " " else ""
    yield runs(line.rstrip(), TEXT) or ()


def _length(text: str) -> float:
    return sum(font.getlength(piece) for piece, font in runs(text, TEXT) or ())
