"""Edits of scenes: a scene before, what is asked for, and the scene after."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from zimgkit.training.world.sampling import colours_on, held_out
from zimgkit.training.world.scattered import CELL, SIDE, box_of, scattered
from zimgkit.training.world.scene import Scene, Thing
from zimgkit.training.world.words import SHAPES

KINDS = ("recolour", "remove", "move", "add", "transfer")
PLACES = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""What moves are called -> towards which side, to whose edge a thing goes."""
_CORNERS = {
    "in the top left corner": (0, 0),
    "in the top right corner": (1, 0),
    "in the bottom left corner": (0, 1),
    "in the bottom right corner": (1, 1),
}
OF_ONE_SCENE = 4
"""So many edits in a row are of the same scene."""
_COUNT_WEIGHTS = (7, 8, 5)
"""Of one, two and three things in scenes to learn from."""
_ADDED = 22.0
"""The radius of a thing that is added, in pixels."""
_TRIES = 1 << 41
_ATTEMPTS = 16
"""At edits of one scene, and at each of its kind: many do not fit."""


@dataclass(frozen=True)
class Edit:
    """One edit.

    Attributes:
        kind: one of :data:`KINDS`.
        before: the pictures that it is asked for with, one or two.
        instruction: what is asked for.
        after: what is to come of them.
    """

    kind: str
    before: tuple[Scene, ...]
    instruction: str
    after: Scene


def edit_to_judge(seed: int, kind: str | None = None) -> Edit:
    """One edit whose scene after shows a combination that is held out; the same for the same arguments.

    The scene before shows none. Nothing can come of removing or moving things but what was there.

    Args:
        seed: any integer below 2**40.
        kind: one of :data:`KINDS`; any if None.
    """
    rng = random.Random(f"edit test {seed}")  # noqa: S311
    while True:
        chosen = kind or rng.choice(KINDS)
        scene = scattered(rng.randrange(_TRIES >> 1), "train")
        if not _tells_apart(scene):
            continue
        made = _EDITS[chosen](rng, scene)
        if made and (chosen in {"remove", "move"} or held_out(made.after)):
            return made


def edit_to_learn(seed: int) -> Edit:
    """One edit whose scenes show nothing that is held out; the same for the same seed.

    Each :data:`OF_ONE_SCENE` seeds ask for different things of one scene: what is to change can only be read in the
    instruction, and not be remembered with the picture.

    Args:
        seed: any integer below 2**40.
    """
    number, place = divmod(seed, OF_ONE_SCENE)
    rng = random.Random(f"edits to learn {number}")  # noqa: S311
    while True:
        (count,) = rng.choices((1, 2, 3), _COUNT_WEIGHTS)
        scene = scattered(rng.randrange(_TRIES >> 1), "train", count=count)
        if not _tells_apart(scene):
            continue
        found: list[Edit] = []
        for _ in range(_ATTEMPTS):
            kind = rng.choice(KINDS)
            made = next(filter(None, (_EDITS[kind](rng, scene) for _ in range(_ATTEMPTS))), None)
            if made and not held_out(made.after) and made not in found:
                found.append(made)
            if len(found) == OF_ONE_SCENE:
                return found[place]


def _with(scene: Scene, index: int, *things: Thing) -> Scene:
    return replace(scene, things=(*scene.things[:index], *things, *scene.things[index + 1 :]))


def _recolour(rng: random.Random, scene: Scene) -> Edit | None:
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    colour = rng.choice([name for name in colours_on(scene.background) if name != thing.colour])
    new = replace(thing, colour=colour)
    return Edit("recolour", (scene,), f"make the {thing.shape} {colour}", _with(scene, index, new))


def _remove(rng: random.Random, scene: Scene) -> Edit | None:
    if len(scene.things) == 1:
        return None
    index = rng.randrange(len(scene.things))
    return Edit("remove", (scene,), f"remove the {scene.things[index].shape}", _with(scene, index))


def _move(rng: random.Random, scene: Scene) -> Edit | None:
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    words, (across, down) = rng.choice([*PLACES.items()])
    half = (box_of(thing)[2] - box_of(thing)[0]) / 2
    x = {-1: half, 0: thing.x, 1: SIDE - half}[across]
    y = {-1: half, 0: thing.y, 1: SIDE - half}[down]
    new = replace(thing, x=x, y=y)
    after = _with(scene, index, new)
    if max(abs(x - thing.x), abs(y - thing.y)) < 2 * CELL or _crowded(after):
        return None
    return Edit("move", (scene,), f"move the {thing.shape} {words}", after)


def _add(rng: random.Random, scene: Scene) -> Edit | None:
    shapes = [name for name in SHAPES if name not in {thing.shape for thing in scene.things}]
    words, (right, bottom) = rng.choice([*_CORNERS.items()])
    near, far = 3 * CELL / 2, SIDE - 3 * CELL / 2
    colour, shape = rng.choice(colours_on(scene.background)), rng.choice(shapes)
    new = Thing(shape, colour, far if right else near, far if bottom else near, _ADDED)
    after = replace(scene, things=(*scene.things, new))
    if len(after.things) > 3 or _crowded(after):
        return None
    return Edit("add", (scene,), f"add {_article(colour)} {colour} {shape} {words}", after)


def _transfer(rng: random.Random, scene: Scene) -> Edit | None:
    other = scattered(rng.randrange(_TRIES >> 1), "train")
    thing, wanted = scene.things[0], other.things[0].colour
    fits = wanted in colours_on(scene.background) and wanted != thing.colour
    if len(scene.things) > 1 or len(other.things) > 1 or not fits:
        return None
    new = replace(thing, colour=wanted)
    words = "the shape of picture 1 in the colour of picture 2"
    return Edit("transfer", (scene, other), words, _with(scene, 0, new))


_EDITS = {"recolour": _recolour, "remove": _remove, "move": _move, "add": _add, "transfer": _transfer}


def _tells_apart(scene: Scene) -> bool:
    """Whether the name of a shape tells which thing is meant."""
    return len({thing.shape for thing in scene.things}) == len(scene.things)


def _crowded(scene: Scene) -> bool:
    """Whether boxes of two things meet."""
    boxes = [box_of(thing) for thing in scene.things]
    return any(
        a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
        for number, a in enumerate(boxes)
        for b in boxes[:number]
    )


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
