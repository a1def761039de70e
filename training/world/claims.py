"""Scene -> what its caption claims, for the judge of pictures."""

from __future__ import annotations

from itertools import pairwise

from zimgkit.training.judge import Claim, Counted, Placed, Present, Related, Sized
from zimgkit.training.world.scene import Scene


def claims(scene: Scene) -> tuple[Claim, ...]:
    """All that a caption says of the things in the picture; nothing of the background or of words."""
    names = [(thing.shape, thing.colour) for thing in scene.things]
    told: list[Claim] = [Counted(len(names)), *(Present(name) for name in names)]
    told += [Sized(name, thing.size) for name, thing in zip(names, scene.things, strict=True) if thing.size]
    if scene.place:
        told.append(Placed(names[0], scene.place))
    if scene.arrangement and scene.arrangement_told:
        relation = "left of" if scene.arrangement == "row" else "above"
        told += [Related(first, relation, second) for first, second in pairwise(names)]
    return tuple(told)
