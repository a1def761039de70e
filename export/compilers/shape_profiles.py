"""Which pictures and prompts an engine shall serve, and what that means for the free sides of each graph."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from zimgkit.engines.bundle import Manifest, Range
from zimgkit.engines.errors import UsageError
from zimgkit.runtime.families import family

Size = tuple[int, int]
"""Width and height in pixels."""
LIKELY_TOKENS = 128
"""A prompt of a few sentences."""
LEAST = (256, 256)
MULTIPLE = 16


@dataclass(frozen=True)
class Served:
    """What engines are compiled for."""

    sizes: tuple[Size, ...] = ()
    """Each gets a profile of its own. The bundle's recommended size where this and ``span`` are empty."""
    span: tuple[Size | None, Size | None, Size] | None = None
    """The least, likeliest and largest size of one more profile, which serves all between; None leaves one open."""
    max_prompt_tokens: int | None = None
    """Rows of the text encoder's output a prompt may have; the bundle's ``max_sequence_length`` when None."""
    batch: int = 1
    """How many pictures of one prompt are denoised together at most."""


RECOMMENDED = Served()
"""The bundle's recommended size."""


def parse_size(text: str) -> Size:
    """``"1024x768"`` to width and height.

    Raises:
        UsageError: it is no such text.
    """
    match = re.fullmatch(r"(\d{1,6})[x×X](\d{1,6})", text.strip())
    if not match:
        raise UsageError(f"{text!r} is no size", "give WIDTHxHEIGHT in pixels, such as 1024x1024")
    return int(match[1]), int(match[2])


def profiles(manifest: Manifest, served: Served) -> dict[str, tuple[dict[str, Range], ...]]:
    """The shape profiles of every component that has a graph: free side -> least, likeliest, most.

    A component gets one profile per different set of ranges; one that does not depend on the picture gets one.

    Raises:
        UsageError: a size is not a multiple of 16, too large, or not between the others; tokens or batch out of range.
    """
    spans = _spans(manifest, served)
    least, likely, most = _tokens(manifest, served.max_prompt_tokens)
    if not 1 <= served.batch <= 64:
        raise UsageError(f"batch is {served.batch}", "give a number from 1 to 64")
    sides = family(manifest.family).dynamic_dimensions
    whole: list[dict[str, Range]] = []
    for sizes in spans:
        ends = [
            sides(height, width, tokens) for (width, height), tokens in zip(sizes, (least, likely, most), strict=True)
        ]
        ranges = {side: (ends[0][side], ends[1][side], ends[2][side]) for side in ends[0]}
        whole.append(ranges | {"batch": (1, 1, served.batch)})
    found = {}
    for name, component in manifest.components.items():
        if component.graphs:
            free = dict.fromkeys(s for spec in component.inputs.values() for s in spec.shape if isinstance(s, str))
            own = [{side: ranges[side] for side in free} for ranges in whole]
            found[name] = tuple(ranges for index, ranges in enumerate(own) if ranges not in own[:index])
    return found


def _spans(manifest: Manifest, served: Served) -> list[tuple[Size, Size, Size]]:
    spans: list[tuple[Size, Size, Size]] = [(size, size, size) for size in dict.fromkeys(served.sizes)]
    recommended = (manifest.defaults.width, manifest.defaults.height)
    if served.span:
        least, likely, most = served.span
        least = least or _smaller(LEAST, most)
        likely = likely or (recommended if _between(least, recommended, most) else most)
        if not _between(least, likely, most):
            order = ", ".join(f"{w}x{h}" for w, h in (least, likely, most))
            raise UsageError(f"the least, likeliest and largest size are {order}", "give them in rising order")
        spans.append((least, likely, most))
    spans = spans or [(recommended, recommended, recommended)]
    longest = family(manifest.family).MAX_SIDE
    for size in dict.fromkeys(size for span in spans for size in span):
        if any(side % MULTIPLE or not MULTIPLE <= side <= longest for side in size):
            raise UsageError(
                f"the size {size[0]}x{size[1]} cannot be drawn",
                f"give sides that are multiples of {MULTIPLE}, up to {longest}",
            )
    return spans


def _between(least: Size, size: Size, most: Size) -> bool:
    return all(a <= b <= c for a, b, c in zip(least, size, most, strict=True))


def _smaller(a: Size, b: Size) -> Size:
    return min(a[0], b[0]), min(a[1], b[1])


def _tokens(manifest: Manifest, max_prompt_tokens: int | None) -> Sequence[int]:
    """Token ids of the shortest, a likely and the longest prompt, with the part of the template that is dropped."""
    text = manifest.text
    longest = text.max_tokens - text.drop
    most = text.max_sequence_length if max_prompt_tokens is None else max_prompt_tokens
    if not 1 <= most <= longest:
        raise UsageError(f"max_prompt_tokens is {most}", f"give a number from 1 to {longest}")
    return [text.drop + rows for rows in (1, min(LIKELY_TOKENS, most), most)]
