"""What captions claim."""

from __future__ import annotations

from dataclasses import replace

from zimgkit.training.judge import Counted, Placed, Present, Related, Sized
from zimgkit.training.world.claims import claims
from zimgkit.training.world.scene import Scene, Thing

CIRCLE, SQUARE, STAR = ("circle", "red"), ("square", "blue"), ("star", "pink")
SCENE = Scene(128, 128, tuple(Thing(*name, 0, 0, 0) for name in (CIRCLE, SQUARE, STAR)), "row")


def test_several() -> None:
    present = Present(CIRCLE), Present(SQUARE), Present(STAR)
    assert claims(SCENE) == (
        Counted(3),
        *present,
        Related(CIRCLE, "left of", SQUARE),
        Related(SQUARE, "left of", STAR),
    )
    assert claims(replace(SCENE, arrangement="column"))[-1] == Related(SQUARE, "above", STAR)
    assert claims(replace(SCENE, arrangement_told=False)) == (Counted(3), *present)


def test_one() -> None:
    one = Scene(128, 128, (Thing(*CIRCLE, 0, 0, 0),))
    assert claims(one) == (Counted(1), Present(CIRCLE))
    told = replace(one, things=(replace(one.things[0], size="large"),), place="top")
    assert claims(told) == (Counted(1), Present(CIRCLE), Sized(CIRCLE, "large"), Placed(CIRCLE, "top"))
