"""Shape profiles: min, opt and max length of each dynamic dimension, from the picture sizes and prompts to serve."""

from __future__ import annotations

import re
from dataclasses import dataclass

from zimgkit.engines.bundle import Component, Manifest, Range
from zimgkit.engines.errors import UsageError
from zimgkit.export.networks.registry import REGIONS
from zimgkit.runtime.families import family, family_of
from zimgkit.runtime.families.base import PictureFamily, SegmentedFamily
from zimgkit.runtime.references import dimension_ranges

Size = tuple[int, int]
"""Width and height in pixels."""
OPT_TOKENS = 128
"""The prompt length that a profile is optimized for: a few sentences."""
MIN_SIZE = (256, 256)
"""The smallest picture of a size range that names none."""
MULTIPLE = 16
"""Widths and heights are multiples of so many pixels."""


@dataclass(frozen=True)
class ServedShapes:
    """The picture sizes, prompt lengths and batch sizes that engines are compiled for."""

    sizes: tuple[Size, ...] = ()
    """Each gets a shape profile of its own. The bundle's recommended size where this and ``size_range`` are empty."""
    size_range: tuple[Size | None, Size | None, Size] | None = None
    """Min, opt and max size of one more profile, which serves all sizes between. A min of None is :data:`MIN_SIZE`, an
    opt of None the bundle's recommended size, or max where the recommended size is outside the range."""
    max_prompt_tokens: int | None = None
    """How many rows of the text encoder's output a prompt may have; the bundle's ``max_sequence_length`` when None."""
    batch: int = 1
    """How many pictures of one prompt are denoised together at most."""


RECOMMENDED = ServedShapes()
"""The bundle's recommended size, and prompts of every length."""


def parse_size(text: str) -> Size:
    """Parse a size such as ``"1024x768"``.

    Returns:
        Width and height in pixels.

    Raises:
        UsageError: the text is not WIDTHxHEIGHT.
    """
    match = re.fullmatch(r"(\d{1,6})[x×X](\d{1,6})", text.strip())
    if not match:
        raise UsageError(f"{text!r} is no size", "give WIDTHxHEIGHT in pixels, such as 1024x1024")
    return int(match[1]), int(match[2])


def shape_profiles(manifest: Manifest, shapes: ServedShapes) -> dict[str, tuple[dict[str, Range], ...]]:
    """Compute the shape profiles of every component that has a graph.

    A component gets one profile for each different set of ranges; one that does not depend on the picture gets one.

    Args:
        manifest: of the bundle.
        shapes: the sizes, prompts and batches to serve.

    Returns:
        Component -> its profiles, each of them: dynamic dimension -> (min, opt, max) length.

    Raises:
        UsageError: a size is not a multiple of 16, too large, or not in rising order; tokens or batch out of range.
    """
    size_ranges = _size_ranges(manifest, shapes)
    tokens = _token_range(manifest, shapes.max_prompt_tokens)
    if not 1 <= shapes.batch <= 64:
        raise UsageError(f"batch is {shapes.batch}", "give a number from 1 to 64")
    found = {}
    for name, component in manifest.components.items():
        if component.graphs:
            whole = [_ranges(manifest, name, sizes, tokens) | {"batch": (1, 1, shapes.batch)} for sizes in size_ranges]
            own = [{dimension: ranges[dimension] for dimension in dynamic_dimensions(component)} for ranges in whole]
            found[name] = tuple(ranges for index, ranges in enumerate(own) if ranges not in own[:index])
    return found


def _ranges(
    manifest: Manifest, component: str, sizes: tuple[Size, Size, Size], tokens: tuple[int, int, int]
) -> dict[str, Range]:
    """The range of every dynamic dimension in one component, but for the batch."""
    host = family_of(manifest)
    read: dict[str, Range] = {}
    if manifest.references is not None and isinstance(host, PictureFamily):
        read = dimension_ranges(manifest.references, host)
        if isinstance(host, SegmentedFamily):  # A prompt is in so many pieces, and each is filled up.
            tokens = (*tokens[:2], host.segments_tokens([tokens[2], *[1] * (manifest.references.most + 1)]))
    # Layers are drawn together, the first with what they make up.
    most = manifest.layers.layers + 1 if manifest.layers else 1
    frames = (min(2, most), most, most)
    ends = []
    for index, ((width, height), count) in enumerate(zip(sizes, tokens, strict=True)):
        # What controls a picture has its size.
        beside = read["conditions"][index] if read else height // MULTIPLE * (width // MULTIPLE)
        conditions = beside if component.split(".")[1:2] in (["conditions"], ["masked_conditions"]) else 0
        ends.append(host.dynamic_dimensions(height, width, count, conditions, frames[index]))
    return {name: (ends[0][name], ends[1][name], ends[2][name]) for name in ends[0]} | read


def dynamic_dimensions(component: Component) -> tuple[str, ...]:
    """The names of the dynamic dimensions of a component's inputs, each once."""
    return tuple(dict.fromkeys(d for spec in component.inputs.values() for d in spec.shape if isinstance(d, str)))


def _size_ranges(manifest: Manifest, shapes: ServedShapes) -> list[tuple[Size, Size, Size]]:
    """The min, opt and max size of each profile."""
    found: list[tuple[Size, Size, Size]] = [(size, size, size) for size in dict.fromkeys(shapes.sizes)]
    recommended = (manifest.defaults.width, manifest.defaults.height)
    if shapes.size_range:
        min_size, opt_size, max_size = shapes.size_range
        min_size = min_size or _smaller(MIN_SIZE, max_size)
        opt_size = opt_size or (recommended if _between(min_size, recommended, max_size) else max_size)
        if not _between(min_size, opt_size, max_size):
            order = ", ".join(f"{w}x{h}" for w, h in (min_size, opt_size, max_size))
            raise UsageError(f"the min, opt and max size are {order}", "give them in rising order")
        found.append((min_size, opt_size, max_size))
    found = found or [(recommended, recommended, recommended)]
    longest = family(manifest.family).MAX_SIDE
    for size in dict.fromkeys(size for sizes in found for size in sizes):
        if any(pixels % MULTIPLE or not MULTIPLE <= pixels <= longest for pixels in size):
            raise UsageError(
                f"the size {size[0]}x{size[1]} cannot be drawn",
                f"give a width and a height that are multiples of {MULTIPLE}, up to {longest}",
            )
    return found


def _between(low: Size, size: Size, high: Size) -> bool:
    """Whether both the width and the height are within those of two sizes."""
    return all(a <= b <= c for a, b, c in zip(low, size, high, strict=True))


def _smaller(a: Size, b: Size) -> Size:
    """The smaller width with the smaller height of two sizes."""
    return min(a[0], b[0]), min(a[1], b[1])


def _token_range(manifest: Manifest, max_prompt_tokens: int | None) -> tuple[int, int, int]:
    """Min, opt and max number of token ids, with the part of the template whose rows are dropped."""
    text = manifest.text
    longest = text.max_tokens - text.drop
    rows = text.max_sequence_length if max_prompt_tokens is None else max_prompt_tokens
    if not 1 <= rows <= longest:
        raise UsageError(f"max_prompt_tokens is {rows}", f"give a number from 1 to {longest}")
    # Prompts of regions have the template of text alone, also where the others speak of pictures.
    least = min(text.drop, family(manifest.family).TEXT.drop) if REGIONS in manifest.tasks else text.drop
    return least + 1, text.drop + min(OPT_TOKENS, rows), text.drop + rows
