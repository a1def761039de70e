"""Pictures and their captions laid out on one page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont
    from PIL.ImageFont import ImageFont as BitmapFont

GAP, MARGIN, TEXT = 4, 10, 14
"""Between pictures of a cell, around a cell, and the height of letters, in pixels."""
PAPER, INK, FRAME = (255, 255, 255), (60, 60, 60), (215, 215, 215)


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
