"""Whether the engines compiled for a bundle serve a call, said before any work is done."""

from __future__ import annotations

from collections.abc import Mapping

from zimgkit.engines.bundle import Bundle, Range
from zimgkit.engines.errors import UsageError


def check_served(bundle: Bundle, backend: str, sides: Mapping[str, int], width: int, height: int) -> None:
    """Check that every component's engines have a profile that holds these sides.

    Components without an engine are left to whoever opens them.

    Args:
        bundle: an open bundle.
        backend: the backend that will run it.
        sides: free side -> length, as the family's ``graph_sides`` gives them.
        width: of the picture in pixels, for the message.
        height: likewise.

    Raises:
        UsageError: naming the component and what its engines serve.
    """
    for component in bundle.manifest.components:
        profiles = [profile for engine in bundle.engines(component, backend) for profile in engine.profiles]
        if profiles and not any(_holds(profile, sides) for profile in profiles):
            ranges = [", ".join(f"{side} {_text(ends)}" for side, ends in profile.items()) for profile in profiles]
            wanted = {side: sides[side] for profile in profiles for side in profile if side in sides}
            asked = ", ".join(f"{side} {length}" for side, length in wanted.items())
            raise UsageError(
                f"{width}x{height} with this prompt is {asked}, and {component} was compiled for {' or '.join(ranges)}",
                f"compile it for all sizes wanted: zimg-export compile {bundle.root} --size {width}x{height} --size …",
            )


def largest_batch(bundle: Bundle, component: str, backend: str) -> int:
    """How many pictures the engines of a component take at once; 1 where none is compiled."""
    profiles = [profile for engine in bundle.engines(component, backend) for profile in engine.profiles]
    return min((profile["batch"][2] for profile in profiles if "batch" in profile), default=1)


def _holds(profile: Mapping[str, Range], sides: Mapping[str, int]) -> bool:
    return all(least <= sides[side] <= most for side, (least, _, most) in profile.items() if side in sides)


def _text(ends: Range) -> str:
    return str(ends[2]) if ends[0] == ends[2] else f"{ends[0]}…{ends[2]}"
