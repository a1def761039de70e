"""Whether the engines compiled for a bundle serve a call, said before any work is done."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from zimgkit.engines.bundle import Bundle, Range
from zimgkit.engines.errors import UsageError


def check_served(
    bundle: Bundle, backend: str, components: Collection[str], sizes: Mapping[str, int], width: int, height: int
) -> None:
    """Check that the engines of some components have a shape profile that holds these sizes.

    Components without an engine are left to whoever opens them.

    Args:
        bundle: an open bundle.
        backend: the backend that will run it.
        components: those that the call needs; what the bundle has not is passed over.
        sizes: dynamic dimension -> length, as :meth:`.families.base.Family.dynamic_dimensions` gives them.
        width: of the picture in pixels, for the message.
        height: likewise.

    Raises:
        UsageError: naming the component and what its engines serve.
    """
    for component in components:
        profiles = [profile for engine in bundle.engines(component, backend) for profile in engine.profiles]
        if profiles and not any(_holds(profile, sizes) for profile in profiles):
            ranges = [
                ", ".join(f"{dimension} {_text(ends)}" for dimension, ends in profile.items()) for profile in profiles
            ]
            wanted = {name: sizes[name] for profile in profiles for name in profile if name in sizes}
            asked = ", ".join(f"{name} {size}" for name, size in wanted.items())
            raise UsageError(
                f"{width}x{height} with this prompt is {asked}, and {component} was compiled for {' or '.join(ranges)}",
                f"compile it for all sizes wanted: zimg-export compile {bundle.root} --size {width}x{height} --size …",
            )


def serves(bundle: Bundle, component: str, backend: str, sizes: Mapping[str, int]) -> bool:
    """Whether the engines of a component have a shape profile that holds these sizes, or need none."""
    profiles = [profile for engine in bundle.engines(component, backend) for profile in engine.profiles]
    return not profiles or any(_holds(profile, sizes) for profile in profiles)


def largest_batch(bundle: Bundle, component: str, backend: str) -> int:
    """How many pictures the engines of a component take at once; 1 where none is compiled."""
    profiles = [profile for engine in bundle.engines(component, backend) for profile in engine.profiles]
    return min((profile["batch"][2] for profile in profiles if "batch" in profile), default=1)


def _holds(profile: Mapping[str, Range], sizes: Mapping[str, int]) -> bool:
    return all(low <= sizes[name] <= high for name, (low, _, high) in profile.items() if name in sizes)


def _text(ends: Range) -> str:
    return str(ends[2]) if ends[0] == ends[2] else f"{ends[0]}…{ends[2]}"
