"""What a bundle is asked for when it is judged: scenes that no model was trained on, and pictures to change.

Of a picture, one thing is changed where it is: drawn from the picture its shape or colour, within a mask both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from zimgkit.runtime.pictures.control_maps import canny
from zimgkit.training.judge import Claim, Counted, Placed, Present, Related, Within
from zimgkit.training.world.captions import caption, noun
from zimgkit.training.world.claims import claims
from zimgkit.training.world.drawing import draw
from zimgkit.training.world.edits import KINDS, edit_to_judge
from zimgkit.training.world.render import region
from zimgkit.training.world.sampling import sample, with_another
from zimgkit.training.world.scattered import SIDE, Box, box_of, scattered
from zimgkit.training.world.scene import Scene, Thing

FIRST_SEED = 1_000_000
"""Of the scenes."""
SNUG, LEAST = 2, 0.8
"""How far a thing may lie from its edges, in pixels beside the judge's slack, and the least share of its size."""
ROOMY = 0.6
"""The least share of a region's side that its thing has."""
MARGIN = 8
"""Of a mask around a thing, in pixels: a latent, so that no latent that is kept holds the thing's edge."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One picture to ask for.

    Attributes:
        scene: what is to be in the picture.
        before: the picture it is drawn from.
        mask: white where that is drawn anew.
        edges: what controls the picture.
        regions: for each of the scene's things, the mask that it is to lie in.
        edited: one or two pictures that it is to be made of.
        instruction: what is to be made of them.
        touched: boxes in the first of them that what changes lies in, before or after.
    """

    scene: Scene
    before: Image.Image | None = None
    mask: Image.Image | None = None
    edges: Image.Image | None = None
    regions: tuple[Image.Image, ...] = ()
    edited: tuple[Image.Image, ...] = ()
    instruction: str = ""
    touched: tuple[Box, ...] = ()

    @property
    def caption(self) -> str:
        """The prompt."""
        return self.instruction or caption(self.scene)

    @property
    def claims(self) -> list[Claim]:
        """What the picture has to show: things, how they lie and, where it was drawn from another, their place."""
        if self.edges is not None or self.edited:
            return _within(self.scene, [_reach(thing, SNUG) for thing in self.scene.things], LEAST)
        if self.regions:
            return _within(self.scene, [box_of(thing) for thing in self.scene.things], ROOMY)
        kinds = Present | Related if self.before is None else Present | Related | Placed
        return [claim for claim in claims(self.scene) if isinstance(claim, kinds)]

    @property
    def pictures(self) -> dict[str, Any]:
        """Arguments of a call."""
        if self.edited:
            return {"image": list(self.edited)}
        if self.edges is not None:
            return {"control_image": self.edges}
        if self.regions:
            nouns = [noun(thing, self.scene) for thing in self.scene.things]
            return {"eligen_entity_prompts": nouns, "eligen_entity_masks": list(self.regions)}
        if self.before is None:
            return {}
        return {"image": self.before} | ({"mask_image": self.mask, "keep_unmasked": True} if self.mask else {})

    def levels_changed(self, picture: Image.Image) -> int:
        """By how much a picture differs at the most from the one before where the mask keeps that; 0 without one."""
        if self.before is None or self.mask is None:
            return 0
        difference = np.abs(_levels(picture) - _levels(self.before))
        return int(difference[_levels(self.mask) == 0].max(initial=0))

    def harm(self, picture: Image.Image) -> float:
        """By how many levels a picture differs in the mean from the one that is edited, where nothing was to change."""
        if not self.edited:
            return 0.0
        difference = np.abs(_levels(picture) - _levels(self.edited[0])).astype(np.float64)
        for left, top, right, bottom in self.touched:
            difference[max(0, top) : bottom, max(0, left) : right] = 0
        return float(difference.mean())


def trials(task: str, count: int) -> list[Trial]:
    """Trials of one thing and of two in turns.

    Args:
        task: ``"text-to-image"``, ``"image-to-image"`` or ``"inpaint"``; ``"control"``, by edges; ``"regions"``; or
            ``"edit"``, of all kinds of edits in turns.
        count: how many.

    Raises:
        ZimgError: edges are asked for, and what finds them is not installed.
    """
    if task == "edit":
        return [_edit(number) for number in range(count)]
    if task in {"control", "regions"}:
        return [_placed(task, scene) for scene in scattered_scenes(count, ordered=task == "control")]
    half = -(-count // 2)
    pairs = zip(held_out_scenes(half, 1), held_out_scenes(half, 2), strict=True)
    scenes = [scene for pair in pairs for scene in pair][:count]
    return [_trial(task, number, scene) for number, scene in enumerate(scenes)]


def held_out_scenes(count: int, things: int) -> list[Scene]:
    """Scenes of the test split, 128x128 pixels, whose captions tell how two things lie."""
    scenes: list[Scene] = []
    seed = FIRST_SEED * things
    while len(scenes) < count:
        scene = sample(seed, "test", count=things, size=(128, 128))
        if things == 1 or scene.arrangement_told:
            scenes.append(scene)
        seed += 1
    return scenes


def scattered_scenes(count: int, *, ordered: bool) -> list[Scene]:
    """Scenes of the test split whose things lie anywhere, with one thing and with two in turns; see ``scattered``."""
    scenes: list[Scene] = []
    seed = FIRST_SEED
    while len(scenes) < count:
        scene = scattered(seed, "test", ordered=ordered)
        if len(scene.things) == len(scenes) % 2 + 1:
            scenes.append(scene)
        seed += 1
    return scenes


def _placed(task: str, scene: Scene) -> Trial:
    if task == "control":
        return Trial(scene, edges=canny(draw(scene)))
    return Trial(scene, regions=tuple(region(box_of(thing)) for thing in scene.things))


def _edit(number: int) -> Trial:
    made = edit_to_judge(FIRST_SEED + number, KINDS[number % len(KINDS)])
    first = made.before[0]
    moved = {*first.things} ^ {*made.after.things}
    return Trial(
        made.after,
        edited=tuple(draw(scene) for scene in made.before),
        instruction=made.instruction,
        touched=tuple(_reach(thing, MARGIN) for thing in sorted(moved, key=repr)),
    )


def _within(scene: Scene, boxes: list[Box], least: float) -> list[Claim]:
    """So many things, and each of them in its box, in pixels."""
    shares = [(left / SIDE, top / SIDE, right / SIDE, bottom / SIDE) for left, top, right, bottom in boxes]
    told = [Within((t.shape, t.colour), box, least) for t, box in zip(scene.things, shares, strict=True)]
    return [Counted(len(told)), *told]


def _reach(thing: Thing, more: int) -> Box:
    """The box that a thing fills, in pixels, and so many on each side."""
    left, top, right, bottom = (round(v) for v in (thing.x, thing.y, thing.x, thing.y))
    reach = round(thing.radius) + more
    return left - reach, top - reach, right + reach, bottom + reach


def _trial(task: str, number: int, scene: Scene) -> Trial:
    # One thing and two take turns, so halves of the number decide what does not depend on that.
    index = number // 2 % len(scene.things)
    if task == "image-to-image":
        turns = number // 4 % 2 == 0
        return Trial(with_another(scene, index, number, shape=turns, colour=not turns), draw(scene))
    if task == "inpaint":
        return Trial(with_another(scene, index, number), draw(scene), _around(scene, scene.things[index]))
    return Trial(scene)


def _around(scene: Scene, thing: Thing) -> Image.Image:
    """A mask with a box around a thing."""
    mask, reach = Image.new("L", (scene.width, scene.height)), thing.radius + MARGIN
    ImageDraw.Draw(mask).rectangle((thing.x - reach, thing.y - reach, thing.x + reach, thing.y + reach), fill=255)
    return mask


def _levels(picture: Image.Image) -> NDArray[np.int64]:
    return np.asarray(picture, np.int64)
