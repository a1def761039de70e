"""Fonts for captions: Pillow's own, one with the Chinese characters of the carried models, and those of the system.

``droid-sans-fallback.ttf`` is Droid Sans Fallback (Google, Apache-2.0), cut down with fonttools' ``pyftsubset
--no-hinting`` to the characters that the captions of the carried models and the prompts of calibrations have.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

CARRIED = Path(__file__).with_name("droid-sans-fallback.ttf")
FOLDERS = (
    *("~/.local/share/fonts", "~/.fonts", "/usr/local/share/fonts", "/usr/share/fonts"),
    *("/Library/Fonts", "/System/Library/Fonts", "C:/Windows/Fonts"),
)
"""Where systems keep fonts."""
MOST_FONTS = 300
"""Fewer than files that a process may have open."""
NO_CHARACTER = "\U0010ffff"
Run = tuple[str, "FreeTypeFont"]
"""A piece of text, and the font to draw it with."""


@lru_cache(4096)
def runs(text: str, size: int) -> tuple[Run, ...] | None:
    """Divide a text among the fonts that have its characters.

    Args:
        text: of one line.
        size: the height of letters, in pixels.

    Returns:
        The pieces in order, as few as possible; None where no font has a character, or nothing here can join or order
        the letters of its script.
    """
    found = next((font for font in _fonts(size, text) if all(_has(font, character) for character in text)), None)
    if found:
        return ((text, found),)
    if any(_is_joined(character) for character in text):
        return None
    fonts = [next((f for f in _fonts(size, character) if _has(f, character)), None) for character in text]
    pieces = groupby(zip(text, fonts, strict=True), lambda pair: pair[1])
    divided = [("".join(character for character, _ in pairs), font) for font, pairs in pieces]
    known = tuple((piece, font) for piece, font in divided if font)
    return known if len(known) == len(divided) else None


def default(size: int) -> FreeTypeFont:
    """Pillow's own font, which has Latin letters."""
    return next(_fonts(size, ""))


def _fonts(size: int, text: str) -> Iterator[FreeTypeFont]:
    """The fonts in the order in which they are tried; the system's are looked for only when they are needed."""
    for place in _places():
        font = _load(place, size)
        if font and (not any(map(_is_joined, text)) or _can_join()):
            yield font


def _places() -> Iterator[Path | None]:
    yield from (None, CARRIED)
    yield from _of_the_system()


@cache
def _of_the_system() -> Sequence[Path]:
    """Font files, regular ones without serifs first."""
    walks = (found for folder in FOLDERS for found in os.walk(os.path.expanduser(folder)))  # noqa: PTH111 - users without a home
    files = (Path(folder, name) for folder, _, names in walks for name in names)
    fonts = [file for file in files if file.suffix.lower() in (".ttf", ".otf", ".ttc")]
    slanted = ("bold", "italic", "oblique", "light", "black", "thin", "condensed", "mono")

    def rank(file: Path) -> tuple[bool, bool, str]:
        name = file.name.lower()
        return any(word in name for word in slanted), "sans" not in name, str(file)

    return sorted(fonts, key=rank)[:MOST_FONTS]


@cache
def _load(place: Path | None, size: int) -> FreeTypeFont | None:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size) if place is None else ImageFont.truetype(str(place), size)  # type: ignore[return-value]
    except OSError:
        return None  # Broken, or of pictures in another size.


@cache
def _has(font: FreeTypeFont, character: str) -> bool:
    """Whether a font draws a character as something else than what it draws for one that there is not."""
    if character == " ":
        return True
    try:
        drawn, missing = (font.getmask(text) for text in (character, NO_CHARACTER))
    except (OSError, ValueError):
        return False
    return (
        character.isprintable()
        and drawn.getbbox() is not None
        and (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))
    )


def _is_joined(character: str) -> bool:
    """Whether a character is written from right to left, or changes with those beside it."""
    return unicodedata.bidirectional(character) in ("R", "AL") or unicodedata.category(character) in ("Mn", "Mc", "Me")


@cache
def _can_join() -> bool:
    from PIL import features

    return bool(features.check("raqm") and features.check("fribidi"))
