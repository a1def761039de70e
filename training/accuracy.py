"""How often a bundle draws what it is asked for, by the judge, over scenes that no model was trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimgkit.engines.bundle import TEXT_TO_IMAGE
from zimgkit.engines.errors import UsageError
from zimgkit.runtime import Pipeline
from zimgkit.runtime.progress import Report, silent
from zimgkit.training.judge import judge
from zimgkit.training.trials import trials

MOST_HARMED = 4.0
"""Levels of 255 that a picture may differ by in the mean where nothing was to be edited; the autoencoder alone, from
pixels to pixels, takes 0.8 of them, and 3 on some stripes."""
MOST_CHANGED = 1
"""Levels of 255 that a pixel may change by where a mask keeps the picture."""


@dataclass(frozen=True)
class Case:
    """A caption, and whether its picture shows what the caption tells.

    Attributes:
        caption: what was asked for.
        things: how many things it tells of.
        right: whether shape and colour of all of them are right and, of two, how they lie; and, of a picture that was
            drawn from another, the place, and all that a mask keeps.
        seen: what the judge saw.
        seed: of the noise.
        changed: by how many levels of 255 the picture differs at the most where a mask keeps it.
    """

    caption: str
    things: int
    right: bool
    seen: str
    seed: int
    changed: int = 0


def accuracy(
    bundle: str | os.PathLike[str],
    *,
    task: str = TEXT_TO_IMAGE,
    captions: int = 200,
    backend: str = "onnxruntime",
    device: str | None = None,
    report: Report = silent,
    **call: Any,
) -> tuple[Case, ...]:
    """Draw held-out scenes and judge them.

    Args:
        bundle: a folder, or the name of a bundle that zimgkit carries.
        task: what to ask for, as for :func:`.trials.trials`.
        captions: how many; every other one tells of one thing, the rest of two.
        backend: as for :meth:`zimgkit.runtime.Pipeline.open`.
        device: as for :meth:`zimgkit.runtime.Pipeline.open`.
        report: called with (stage, done, total).
        call: parameters of the pipeline that are not the bundle's own.

    Raises:
        ZimgError: whatever went wrong, in one line.
    """
    cases = []
    with Pipeline.open(bundle, backend=backend, device=device) as pipeline:
        if task == "edit" and pipeline.bundle.manifest.references is None:
            raise UsageError(f"{bundle} does not edit pictures", "name a bundle of a checkpoint that does")
        wanted = {"negative_prompt": pipeline.bundle.manifest.defaults.negative_prompt} | call
        for seed, trial in enumerate(trials(task, captions)):
            report("accuracy", seed, captions)
            asked: dict[str, Any] = (
                {"height": trial.scene.height, "width": trial.scene.width, "seed": seed} | trial.pictures | wanted
            )
            picture = pipeline(trial.caption, **asked).images[0]
            verdict, changed = judge(picture, trial.claims), trial.levels_changed(picture)
            right = verdict.right and changed <= MOST_CHANGED and trial.harm(picture) <= MOST_HARMED
            seen = ", ".join(f"{thing.colour} {thing.shape}" for thing in verdict.seen)
            cases.append(Case(trial.caption, len(trial.scene.things), right, seen, seed, changed))
        report("accuracy", captions, captions)
    return tuple(cases)


def shares(bundle: Path, captions: int, backend: str, report: Report = silent, **call: Any) -> dict[str, float]:
    """The judge that ``zimg-export`` finds: how many things a caption tells of -> the share drawn right."""
    cases = accuracy(bundle, captions=captions, backend=backend, report=report, **call)
    return {"one": share(cases, 1), "two": share(cases, 2)}


def share(cases: Sequence[Case], things: int) -> float:
    """Which share of the captions of so many things was drawn right; 0 of none."""
    own = [case.right for case in cases if case.things == things]
    return sum(own) / len(own) if own else 0.0
