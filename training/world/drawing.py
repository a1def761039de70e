"""Scene -> picture: anti-aliased shapes over a background, with Pillow."""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from zimgkit.training.world.scene import Background, Scene, Thing

Colour = tuple[int, int, int]
Outline = tuple[tuple[float, float], ...]

COLOURS: dict[str, Colour] = {
    "red": (220, 38, 38),
    "orange": (247, 140, 20),
    "yellow": (250, 215, 40),
    "green": (34, 150, 70),
    "cyan": (50, 195, 205),
    "blue": (25, 95, 220),
    "purple": (150, 45, 165),
    "pink": (247, 130, 185),
    "brown": (120, 72, 35),
    "black": (28, 28, 30),
}
GROUNDS: dict[str, Colour] = {
    "white": (255, 255, 255),
    "light grey": (222, 222, 222),
    "light blue": (208, 228, 246),
    "light green": (212, 240, 208),
    "cream": (250, 241, 216),
    "lavender": (228, 218, 245),
    "dark blue": (30, 38, 84),
}
PERIOD = 16
"""Of stripes, checks and dots, in pixels."""
WRITING_HEIGHT = 28
"""Font size of a word in a picture whose shorter side is 128 pixels."""
LINE = 4
"""Width of outlines, in pixels."""
_SUPERSAMPLING = 4
_TAU = 2 * math.pi


def draw(scene: Scene, *, outlined: bool = False) -> Image.Image:
    """A scene's picture, RGB; the same for the same scene and the same Pillow.

    Args:
        scene: what to draw.
        outlined: draw the outlines of things alone.
    """
    image = _background(scene.background, scene.width, scene.height).copy()
    for thing in scene.things:
        mask, left, top = _coverage(thing, outlined=outlined)
        image.paste(COLOURS[thing.colour], (left, top), mask)
    if scene.writing:
        mask = _written(scene.writing.text, WRITING_HEIGHT * min(scene.width, scene.height) // 128)
        ink = GROUNDS["white"] if scene.background.ground.startswith("dark") else COLOURS["black"]
        y = scene.height * (0.82 if scene.writing.below else 0.18)
        image.paste(ink, (round((scene.width - mask.width) / 2), round(y - mask.height / 2)), mask)
    return image


def _arc(radius: float, start: float, stop: float, centre: float = 0.0) -> Outline:
    """Points on a circle around (centre, 0), angles clockwise from the right."""
    angles = np.linspace(start, stop, 73)
    return tuple((centre + radius * math.cos(a), radius * math.sin(a)) for a in angles.tolist())


def _fit(points: Outline) -> Outline:
    """Move and scale an outline so that its bounding box is centred and its longer half side is one."""
    values = np.array(points)
    low, high = values.min(0), values.max(0)
    fitted = (values - (low + high) / 2) / ((high - low).max() / 2)
    return tuple((x, y) for x, y in fitted.tolist())


def _star() -> Outline:
    radii = (1.0, 0.42)
    angles = [math.pi * i / 5 - math.pi / 2 for i in range(10)]
    return tuple((radii[i % 2] * math.cos(a), radii[i % 2] * math.sin(a)) for i, a in enumerate(angles))


def _heart() -> Outline:
    def y(t: float) -> float:
        return -13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t)

    angles = np.linspace(0, _TAU, 73).tolist()
    return tuple((16 * math.sin(t) ** 3, y(t)) for t in angles)


def _crescent() -> Outline:
    """A disc less a smaller one to its right; the corners are where the two circles meet."""
    shift, inner = 0.45, 0.8
    x = (1 + shift**2 - inner**2) / (2 * shift)
    y = math.sqrt(1 - x**2)
    outer_angle, inner_angle = math.atan2(y, x), math.atan2(y, x - shift)
    return _arc(1, outer_angle, _TAU - outer_angle) + _arc(inner, _TAU - inner_angle, inner_angle, shift)


def _cross() -> Outline:
    arm = 0.34
    corner = ((arm, -1.0), (arm, -arm), (1.0, -arm), (1.0, arm), (arm, arm), (arm, 1.0))
    return corner + tuple((-x, -y) for x, y in corner)


_OUTLINES: dict[str, Outline] = {
    name: _fit(points)
    for name, points in {
        "circle": _arc(1, 0, _TAU),
        "oval": tuple((x, 0.62 * y) for x, y in _arc(1, 0, _TAU)),
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "triangle": ((0, -0.866), (1, 0.866), (-1, 0.866)),
        "diamond": ((0, -1), (0.68, 0), (0, 1), (-0.68, 0)),
        "hexagon": tuple((math.cos(_TAU * i / 6), math.sin(_TAU * i / 6)) for i in range(6)),
        "star": _star(),
        "heart": _heart(),
        "cross": _cross(),
        "ring": _arc(1, 0, _TAU),
        "crescent": _crescent(),
        "bolt": ((0.2, -1), (-0.55, 0.12), (-0.05, 0.12), (-0.25, 1), (0.55, -0.25), (0.05, -0.25), (0.45, -1)),
        "arrow": ((-1, -0.28), (0, -0.28), (0, -0.8), (1, 0), (0, 0.8), (0, 0.28), (-1, 0.28)),
    }.items()
}
"""Shape -> its outline, y down, in a box from -1 to 1."""
_HOLES: dict[str, Outline] = {"ring": _arc(0.55, 0, _TAU)}


def _coverage(thing: Thing, *, outlined: bool) -> tuple[Image.Image, int, int]:
    """How much of each pixel a thing covers, and where that mask's left top corner is."""
    left, top = math.floor(thing.x - thing.radius) - 1, math.floor(thing.y - thing.radius) - 1
    side = math.ceil(2 * thing.radius) + 4
    scale = thing.radius * _SUPERSAMPLING
    # Pillow counts in pixel centres.
    x, y = (thing.x - left) * _SUPERSAMPLING - 0.5, (thing.y - top) * _SUPERSAMPLING - 0.5
    outlines = [
        [(x + scale * u, y + scale * v) for u, v in outline]
        for outline in (_OUTLINES[thing.shape], _HOLES.get(thing.shape))
        if outline
    ]
    mask = Image.new("L", (side * _SUPERSAMPLING, side * _SUPERSAMPLING))
    for outline, fill in zip(outlines, (255, 0), strict=False):
        ImageDraw.Draw(mask).polygon(outline, fill=fill)
    if outlined:
        lines = Image.new("L", mask.size)
        for outline in outlines:
            # Half of the line lies outside, and is cut off.
            ImageDraw.Draw(lines).line([*outline, *outline[:2]], 255, 2 * LINE * _SUPERSAMPLING, joint="curve")
        mask = ImageChops.multiply(mask, lines)
    return mask.reduce(_SUPERSAMPLING), left, top


@functools.lru_cache(maxsize=256)
def _background(background: Background, width: int, height: int) -> Image.Image:
    ground = np.array(GROUNDS[background.ground], np.float64)
    shade = ground + (24 if ground.mean() < 128 else -20)
    y, x = np.mgrid[:height, :width]
    if background.texture == "gradient":
        share = y / y.max()
        shade = np.array(GROUNDS[background.other or background.ground], np.float64)
    elif background.texture == "striped":
        share = x // (PERIOD // 2) % 2
    elif background.texture == "checked":
        share = (x // PERIOD + y // PERIOD) % 2
    elif background.texture == "dotted":
        share = np.tile(_dot(), (math.ceil(height / PERIOD), math.ceil(width / PERIOD)))[:height, :width]
    else:
        share = np.zeros((height, width))
    pixels = ground + share[..., None] * (shade - ground)
    return Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))


def _dot() -> np.ndarray:
    """One period of a dotted background."""
    side = PERIOD * _SUPERSAMPLING
    y, x = np.mgrid[:side, :side] + 0.5 - side / 2
    inside = np.hypot(x, y) < 0.28 * side
    share: np.ndarray = inside.reshape(PERIOD, _SUPERSAMPLING, PERIOD, _SUPERSAMPLING).mean((1, 3))
    return share


@functools.lru_cache(maxsize=256)
def _written(text: str, size: int) -> Image.Image:
    """A word's coverage in Aileron Regular (CC0), the font that Pillow carries; its letters stand a little apart."""
    font = ImageFont.load_default(size)
    _, top, _, bottom = font.getbbox(text)
    widths = [round(font.getlength(letter) + size / 10) for letter in text]
    mask = Image.new("L", (sum(widths), math.ceil(bottom - top)))
    pen = ImageDraw.Draw(mask)
    for index, letter in enumerate(text):
        pen.text((sum(widths[:index]), -top), letter, fill=255, font=font)
    return mask
