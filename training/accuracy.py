"""How often a bundle draws what it is asked for, by the judge, over captions that no model was trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimgkit.runtime import Pipeline
from zimgkit.runtime.progress import Report, silent
from zimgkit.training.judge import Present, Related, judge
from zimgkit.training.world.captions import caption
from zimgkit.training.world.claims import claims
from zimgkit.training.world.sampling import sample
from zimgkit.training.world.scene import Scene

FIRST_SEED = 1_000_000
"""Of the scenes."""


@dataclass(frozen=True)
class Case:
    """A caption, and whether its picture shows what the caption tells.

    Attributes:
        caption: what was asked for.
        things: how many things it tells of.
        right: whether shape and colour of all of them are right and, of two, how they lie.
        seen: what the judge saw.
        seed: of the noise.
    """

    caption: str
    things: int
    right: bool
    seen: str
    seed: int


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


def accuracy(
    bundle: str | os.PathLike[str],
    *,
    captions: int = 200,
    backend: str = "onnxruntime",
    device: str | None = None,
    report: Report = silent,
    **call: Any,
) -> tuple[Case, ...]:
    """Draw held-out captions and judge them.

    Args:
        bundle: a folder, or the name of a bundle that zimgkit carries.
        captions: how many; every other one tells of one thing, the rest of two.
        backend: as for :meth:`zimgkit.runtime.Pipeline.open`.
        device: as for :meth:`zimgkit.runtime.Pipeline.open`.
        report: called with (stage, done, total).
        call: parameters of the pipeline that are not the bundle's own.

    Raises:
        ZimgError: whatever went wrong, in one line.
    """
    half = -(-captions // 2)
    pairs = zip(held_out_scenes(half, 1), held_out_scenes(half, 2), strict=True)
    scenes = [scene for pair in pairs for scene in pair][:captions]
    cases = []
    with Pipeline.open(bundle, backend=backend, device=device) as pipeline:
        wanted = {"negative_prompt": pipeline.bundle.manifest.defaults.negative_prompt} | call
        for seed, scene in enumerate(scenes):
            report("accuracy", seed, captions)
            text = caption(scene)
            picture = pipeline(text, height=scene.height, width=scene.width, seed=seed, **wanted).images[0]
            told = [claim for claim in claims(scene) if isinstance(claim, Present | Related)]
            verdict = judge(picture, told)
            seen = ", ".join(f"{thing.colour} {thing.shape}" for thing in verdict.seen)
            cases.append(Case(text, len(scene.things), all(verdict.holds), seen, seed))
        report("accuracy", captions, captions)
    return tuple(cases)


def shares(bundle: Path, captions: int, backend: str, report: Report = silent) -> dict[str, float]:
    """The judge that ``zimg-export verify`` finds: how many things a caption tells of -> the share drawn right."""
    cases = accuracy(bundle, captions=captions, backend=backend, report=report)
    return {"one": share(cases, 1), "two": share(cases, 2)}


def share(cases: Sequence[Case], things: int) -> float:
    """Which share of the captions of so many things was drawn right; 0 of none."""
    own = [case.right for case in cases if case.things == things]
    return sum(own) / len(own) if own else 0.0
