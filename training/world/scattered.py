"""Scenes whose things lie anywhere: outlines or regions tell where, and captions at most in which order."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

from zimgkit.training.world.sampling import Split, held_out, sample
from zimgkit.training.world.scene import Scene, Thing

SIDE = 128
CELL = 16
"""Boxes around things lie on a grid: a token of the transformer is as large."""
BOXES = {3: 22.0, 4: 28.0, 5: 37.0}
"""Sides of boxes in cells -> the radius of the thing in the middle, in pixels."""
_TRIES = 1 << 40

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels, the last two outside."""


def scattered(seed: int, split: Split = "train", *, count: int | None = None, ordered: bool = False) -> Scene:
    """A picture of 128x128 pixels with one to three things at places of their own; the same for the same arguments.

    Args:
        seed: any integer below 2**40.
        split: ``"train"`` never shows combinations that are held out; ``"test"`` always does.
        count: how many things, 1 to 3; random if None.
        ordered: whether captions tell which of several things is left of the other, or above it.
    """
    number = -1
    while True:
        number += 1
        scene = sample(seed + number * _TRIES, split, count=count, size=(SIDE, SIDE))
        told = ordered and len(scene.things) > 1
        arrangement = scene.arrangement if told else None
        scene = replace(scene, arrangement=arrangement, arrangement_told=told, place=None, writing=None)
        rng = random.Random(f"scattered {split} {seed} {number}")  # noqa: S311
        boxes = _boxes(rng, len(scene.things))
        if boxes is None or held_out(scene) != (split == "test"):
            continue
        if arrangement:
            boxes.sort(key=lambda box: _middle(box)[arrangement == "column"])
            if not _is_order(boxes, arrangement):
                continue
        things = tuple(_within(thing, box) for thing, box in zip(scene.things, boxes, strict=True))
        return replace(scene, things=things)


def box_of(thing: Thing) -> Box:
    """The box on the grid that a scattered thing lies in the middle of."""
    (half,) = (side * CELL // 2 for side, radius in BOXES.items() if radius == thing.radius)
    x, y = int(thing.x), int(thing.y)
    return x - half, y - half, x + half, y + half


def _within(thing: Thing, box: Box) -> Thing:
    left, top, right, bottom = box
    radius = BOXES[(right - left) // CELL]
    return replace(thing, x=(left + right) / 2, y=(top + bottom) / 2, radius=radius, size=None)


def _boxes(rng: random.Random, number: int) -> list[Box] | None:
    """So many boxes that do not meet; None where they do not find room soon."""
    sides = [rng.choice((3, 4) if number > 1 else (3, 4, 5)) for _ in range(number)]
    boxes: list[Box] = []
    for _ in range(30):
        if len(boxes) == number:
            return boxes
        side = sides[len(boxes)]
        left, top = (rng.randrange(SIDE // CELL - side + 1) * CELL for _ in "xy")
        box = left, top, left + side * CELL, top + side * CELL
        if not any(_meet(box, other) for other in boxes):
            boxes.append(box)
    return boxes if len(boxes) == number else None


def _middle(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _is_order(boxes: list[Box], arrangement: str) -> bool:
    """Whether each box is clearly right of the one before, or below it; of two, no further in the other direction."""
    for one, other in pairwise(map(_middle, boxes)):
        steps = other[0] - one[0], other[1] - one[1]
        along, across = steps if arrangement == "row" else steps[::-1]
        if along < 2 * CELL or (len(boxes) == 2 and along < abs(across)):
            return False
    return True


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
