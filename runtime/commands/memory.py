"""How a command tells what draws a picture, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zimgkit.runtime.memory.fitting import line, summary
from zimgkit.runtime.memory.plan import Plan
from zimgkit.runtime.pipeline import Pipeline


def told(pipeline: Pipeline, plan: Plan, say: Callable[[str], None], whose: str = "") -> dict[str, Any]:
    """Say in a line each what was chosen to draw a picture, unless anybody expects it, and how the picture fits.

    Args:
        pipeline: what draws it.
        plan: of one of its calls.
        say: called with each line.
        whose: what the line of the choice begins with.

    Returns:
        How it fits, for machines.
    """
    session = pipeline.session
    if session.choice.reason and not session.choice.is_plain:
        say(f"{whose}{session.choice}")
    short = plan.tiled or plan.rereads or (plan.in_turn and session.engines.memory_budget is None)
    if short or session.memory != "auto":
        say(line(plan, session.family.TILING))
    return summary(plan, session.family.TILING)
