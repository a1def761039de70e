"""How a command tells what a picture takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zimgkit.runtime.memory.fitting import line, summary
from zimgkit.runtime.memory.plan import Plan
from zimgkit.runtime.pipeline import Pipeline


def told(pipeline: Pipeline, plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Say in a line how a picture fits, unless all that stays open by itself does; and give it for machines.

    Args:
        pipeline: what draws it.
        plan: of one of its calls.
        say: called with the line.
    """
    session = pipeline.session
    short = plan.tiled or plan.rereads or (plan.in_turn and session.engines.memory_budget is None)
    if short or session.memory != "auto":
        say(line(plan, session.family.TILING))
    return summary(plan, session.family.TILING)
