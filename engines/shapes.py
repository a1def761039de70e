"""Dynamic dimensions: how large they are in a run, what they make of an output's shape, and which profile serves them.

A :class:`~zimgkit.engines.bundle.TensorSpec` has the name of a dynamic dimension where others have a number. A shape
profile gives the min, opt and max of each, as TensorRT compiles for them:
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-with-dynamic-shapes.html
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from zimgkit.engines.errors import BackendError

if TYPE_CHECKING:
    from zimgkit.engines.bundle import Range, TensorSpec

Shape = tuple[int, ...]
FORM = re.compile(r"(?:(\d+)\*)?(.*?)(?:/([1-9]\d*))?", re.DOTALL)
"""How an output's dimension is written."""
Profile = Mapping[str, "Range"]
"""Dynamic dimension -> its min, opt and max."""


def dimension_sizes(component: str, inputs: Mapping[str, TensorSpec], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The sizes that the dynamic dimensions have in a run.

    Args:
        component: for messages.
        inputs: of the component.
        shapes: of the inputs in this run.

    Raises:
        BackendError: an input does not have the shape that is declared, or two give one dimension different sizes.
    """
    sizes: dict[str, int] = {}
    for name, spec in inputs.items():
        shape = shapes[name]
        dimensions = list(zip(spec.shape, shape, strict=False))
        if len(spec.shape) != len(shape) or any(isinstance(want, int) and want != size for want, size in dimensions):
            raise BackendError(f"{component} takes {name!r} in the shape {spec.shape}, not {shape}")
        for dimension, size in dimensions:
            if isinstance(dimension, str) and sizes.setdefault(dimension, size) != size:
                message = f"{component} got {name!r} of {size} {dimension}, and another input of {sizes[dimension]}"
                raise BackendError(message)
    return sizes


def output_shape(spec: TensorSpec, sizes: Mapping[str, int]) -> Shape | None:
    """The shape of an output: numbers, dynamic dimensions of inputs, or multiples and parts of these.

    These are written so: ``"8*height"``, ``"image_height/8"``.

    Returns:
        None where a dimension is none of these: only the graph can tell.
    """
    shape = []
    for dimension in spec.shape:
        if isinstance(dimension, int):
            shape.append(dimension)
            continue
        many, name, part = re.fullmatch(FORM, dimension).groups()  # type: ignore[union-attr]
        if name not in sizes:
            return None
        shape.append(int(many or 1) * sizes[name] // int(part or 1))
    return tuple(shape)


def choose_profile(
    component: str,
    inputs: Mapping[str, TensorSpec],
    profiles: Sequence[Profile],
    sizes: Mapping[str, int],
    hint: str,
) -> int:
    """The index of the narrowest shape profile that serves a run.

    Args:
        component: for messages.
        inputs: of the component.
        profiles: that it was compiled for. One compiled without any serves every shape.
        sizes: of the dynamic dimensions in this run.
        hint: what to do where no profile serves them.

    Raises:
        BackendError: no profile serves them.
    """
    if not profiles:
        return 0
    widths = [math.prod(high - low + 1 for low, _, high in ranges.values()) for ranges in profiles]
    for index in sorted(range(len(profiles)), key=widths.__getitem__):
        if _serves(profiles[index], sizes):
            return index

    def own(name: str) -> dict[str, int]:
        return {dimension: sizes[dimension] for dimension in inputs[name].shape if isinstance(dimension, str)}

    dynamic = [name for name in inputs if own(name)]
    culprit = next((name for name in dynamic if not any(_serves(ranges, own(name)) for ranges in profiles)), dynamic[0])
    served = ", or ".join(" and ".join(_range(*item) for item in ranges.items()) for ranges in profiles)
    shape = output_shape(inputs[culprit], sizes)
    raise BackendError(f"{component} was compiled for {served}, not for {culprit!r} of shape {shape}", hint)


def _serves(profile: Profile, sizes: Mapping[str, int]) -> bool:
    return all(low <= sizes[name] <= high for name, (low, _, high) in profile.items() if name in sizes)


def _range(dimension: str, ends: Range) -> str:
    low, _, high = ends
    return f"{low} {dimension}" if low == high else f"{low} to {high} {dimension}"
