"""A scene: what is in a picture and what its caption tells of it, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thing:
    """One shape.

    Attributes:
        shape: one of ``words.SHAPES``.
        colour: one of ``words.COLOURS``.
        x: centre of its bounding box in pixels from the left.
        y: the same from the top.
        radius: half of the longer side of its bounding box, in pixels.
        size: ``"small"`` or ``"large"`` where the caption tells it.
    """

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    size: str | None = None


@dataclass(frozen=True)
class Background:
    """What lies behind.

    Attributes:
        texture: one of ``words.TEXTURES``.
        ground: its colour, one of ``words.GROUNDS``.
        other: the second colour of a gradient, which is at the bottom.
        told: whether the caption tells it; a background it does not tell is plain white.
    """

    texture: str = "plain"
    ground: str = "white"
    other: str | None = None
    told: bool = False


@dataclass(frozen=True)
class Writing:
    """A short word above or below the only thing.

    Attributes:
        text: one of ``words.WRITINGS``.
        below: whether it is below the thing.
    """

    text: str
    below: bool = True


@dataclass(frozen=True)
class Scene:
    """One picture and its caption.

    Attributes:
        width: in pixels.
        height: in pixels.
        things: one to three, from left to right or from top to bottom; no two alike in both shape and colour.
        arrangement: ``"row"`` or ``"column"`` where there are several things.
        arrangement_told: whether the caption tells how they lie.
        place: where a single thing is, one of ``words.PLACES``, where the caption tells it.
        background: what lies behind.
        writing: a word in the picture.
        language: ``"en"`` or ``"zh"``.
        phrasing: a number that chooses among the ways to say the same.
    """

    width: int
    height: int
    things: tuple[Thing, ...]
    arrangement: str | None = None
    arrangement_told: bool = True
    place: str | None = None
    background: Background = Background()
    writing: Writing | None = None
    language: str = "en"
    phrasing: int = 0
