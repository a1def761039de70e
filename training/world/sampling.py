"""Seed -> scene, in two splits: what the test split shows was never trained on."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations
from typing import Literal
from zlib import crc32

from zimgkit.engines.errors import UsageError
from zimgkit.training.world.scene import Background, Scene, Thing, Writing
from zimgkit.training.world.words import COLOURS, CONCEPT, GROUNDS, PLACES, SHAPES, TEXTURES, WRITINGS

Split = Literal["train", "test"]
Size = tuple[int, int]

SIZES: tuple[Size, ...] = ((128, 128), (160, 128), (128, 160), (192, 128), (128, 192))
"""(width, height) in pixels, multiples of 16."""
_SIZE_WEIGHTS = (12, 1, 1, 1, 1)
_COUNT_WEIGHTS = (9, 8, 3)  # Of one, two and three things.
_HELD_OUT = 8  # One combination in so many.

# A small model learns shapes soon where patches of pixels recur: there are a few sizes, and middles lie on a grid. And
# where a caption leaves nothing open, for between two places it draws neither: what is not told is always the same.
_GRID = 8  # In pixels.
# Radii as shares of the shorter side, by size and number of things.
_RADII: dict[str | None, tuple[float, ...]] = {
    "small": (0.13, 0.13, 0.13),
    None: (0.22, 0.175, 0.13),
    "large": (0.32, 0.22, 0.13),
}
# Of the dark ground, where light ones have 1. It is unlike the rest, and what lies on it is learned last, so training
# sees much of it: more than a fifth of all pictures.
_DARK_WEIGHT: dict[Split, float] = {"train": 8.0, "test": 2.5}
# What a dark background would swallow.
_DARK = {"black", "blue", "purple", "brown"}


def with_concept(scene: Scene) -> Scene:
    """A scene whose first thing is the shape that the models are not taught."""
    first, *rest = scene.things
    return replace(scene, things=(replace(first, shape=CONCEPT), *rest))


def sample(seed: int, split: Split = "train", *, count: int | None = None, size: Size | None = None) -> Scene:
    """One scene; the same for the same arguments.

    Args:
        seed: any integer.
        split: ``"train"`` never shows what :func:`held_out` keeps back; ``"test"`` always does.
        count: how many things, 1 to 3; random if None.
        size: (width, height) in pixels, multiples of 16 from 128; one of :data:`SIZES` if None.

    Raises:
        UsageError: a count or size beyond that.
    """
    if count not in {None, 1, 2, 3}:
        raise UsageError(f"{count} things do not fit a picture", "ask for one, two or three")
    if size and any(side < 128 or side % 16 for side in size):
        raise UsageError(f"no picture of the world is {size[0]}x{size[1]}", "take multiples of 16 from 128")
    rng = random.Random(f"{split} {seed}")  # noqa: S311
    chosen = count or rng.choices((1, 2, 3), _COUNT_WEIGHTS)[0]
    width, height = size or rng.choices(SIZES, _SIZE_WEIGHTS)[0]
    while True:
        scene = _scene(rng, chosen, width, height, _DARK_WEIGHT[split])
        if held_out(scene) == (split == "test"):
            return scene


def with_another(scene: Scene, index: int, seed: int, *, shape: bool = True, colour: bool = True) -> Scene:
    """A scene of the test split with another thing in the place of one; the same for the same arguments.

    Args:
        scene: any.
        index: which of its things.
        seed: any integer.
        shape: whether the shape is another one, which no thing of the scene has.
        colour: likewise.
    """
    rng = random.Random(f"another {seed}")  # noqa: S311
    old = scene.things[index]
    shapes = [each for each in SHAPES if each not in {thing.shape for thing in scene.things}] if shape else [old.shape]
    colours = [old.colour]
    if colour:
        colours = [c for c in colours_on(scene.background) if c not in {thing.colour for thing in scene.things}]
    # Beside most things there is a combination that was held out; where there is none, any will do.
    named = [replace(old, shape=s, colour=c) for s in shapes for c in colours]
    scenes = [replace(scene, things=(*scene.things[:index], new, *scene.things[index + 1 :])) for new in named]
    return rng.choice([new for new in scenes if held_out(new)] or scenes)


def held_out(scene: Scene) -> bool:
    """Whether a scene shows a combination that is kept out of training.

    Kept back are one in eight of the combinations of shape and colour, on diagonals of their table so that training
    lacks no shape and no colour; and one in eight of the pairs of things by how they lie, by a hash. Right of and below
    are left of and above seen from the other thing.
    """
    diagonals = (SHAPES.index(thing.shape) - COLOURS.index(thing.colour) for thing in scene.things)
    names = [f"{thing.colour} {thing.shape}" for thing in scene.things]
    pairs = (f"{first} {scene.arrangement} {second}" for first, second in combinations(names, 2))
    return any(d % _HELD_OUT == 1 for d in diagonals) or any(crc32(pair.encode()) % _HELD_OUT == 1 for pair in pairs)


def _scene(rng: random.Random, count: int, width: int, height: int, dark_weight: float) -> Scene:
    background = _background(rng, dark_weight)
    names = _names(rng, count, background)
    place = writing = None
    if count == 1 and rng.random() < 0.12:
        writing = Writing(rng.choice(WRITINGS), below=rng.random() < 0.7)
    elif count == 1 and rng.random() < 0.5:
        place = rng.choice(PLACES)
    arrangement, told = (None, False) if count == 1 else (rng.choice(("row", "column")), rng.random() < 0.9)
    if count > 1 and not told:
        arrangement = "row"  # A caption that leaves it open means this one.
    cells = _cells(width, height, count, arrangement, place, writing)
    room = (count, 1) if arrangement == "row" else (1, count)
    if place not in {None, "centre"} or writing:
        room = (1, 2)  # As large as one of two.
    sizes = [rng.choice(("small", "large")) if count < 3 and rng.random() < 0.35 else None for _ in names]
    radii = [_RADII[size][max(room) - 1] * min(width, height) for size in sizes]
    things = tuple(
        Thing(*name, x=x, y=y, radius=radius, size=size)
        for name, (x, y), radius, size in zip(names, cells, radii, sizes, strict=True)
    )
    return Scene(
        width,
        height,
        things,
        arrangement,
        arrangement_told=told,
        place=place,
        background=background,
        writing=writing,
        language="zh" if rng.random() < 0.4 else "en",
        phrasing=rng.getrandbits(32),
    )


def _names(rng: random.Random, count: int, background: Background) -> list[tuple[str, str]]:
    """Shapes and colours that differ and show on the background."""
    colours = colours_on(background)
    names: list[tuple[str, str]] = []
    while len(names) < count:
        name = rng.choice(SHAPES), rng.choice(colours)
        if name not in names:
            names.append(name)
    return names


def colours_on(background: Background) -> list[str]:
    """Those that show on a background."""
    return [colour for colour in COLOURS if not (background.ground.startswith("dark") and colour in _DARK)]


def _background(rng: random.Random, dark_weight: float) -> Background:
    if rng.random() < 0.5:
        return Background()
    texture = rng.choices(TEXTURES, (4, 2, 1, 1, 1))[0]
    if texture == "gradient":
        ground, other = rng.sample(GROUNDS[:-1], 2)  # Light ones: between light and dark lie the colours of things.
        return Background(texture, ground, other, told=True)
    weights = [dark_weight if ground.startswith("dark") else 1.0 for ground in GROUNDS]
    return Background(texture, rng.choices(GROUNDS, weights)[0], told=True)


def _cells(
    width: int, height: int, count: int, arrangement: str | None, place: str | None, writing: Writing | None
) -> list[tuple[int, int]]:
    """Where the middles of things are, in pixels, on the grid."""

    def at(x: float, y: float) -> tuple[int, int]:
        return round(width * x / _GRID) * _GRID, round(height * y / _GRID) * _GRID

    if count > 1:
        steps = [(index + 0.5) / count for index in range(count)]
        return [at(step, 0.5) if arrangement == "row" else at(0.5, step) for step in steps]
    if writing:
        return [at(0.5, 0.375 if writing.below else 0.625)]
    words = (place or "").split()
    x = 0.25 if "left" in words else 0.75 if "right" in words else 0.5
    y = 0.25 if "top" in words else 0.75 if "bottom" in words else 0.5
    return [at(x, y)]
