"""A program for inputs of known shapes: what follows from these alone is computed once, and stays as constants.

What is left are calls of tensors with numbers beside them, which can be traced and recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zimgkit.engines.torch.graph import HOST_CONSTANT, Program, Step, schedule
from zimgkit.engines.torch.ops import HOST_INPUTS

INTEGERS = (torch.int32, torch.int64)
LARGEST = 1 << 16
"""Numbers of a result that is kept for every shape; but for ranges, larger ones are computed in every run."""


class NotStaticError(RuntimeError):
    """A size or an axis depends on more than shapes."""


@dataclass(frozen=True)
class Bound:
    """A function of tensors with everything else at its place."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    """:data:`TENSOR` where a tensor goes."""
    keywords: dict[str, Any]

    def __call__(self, *tensors: Tensor | None) -> Any:
        """Call it."""
        return self.function(*self.filled(tensors), **self.keywords)

    def filled(self, tensors: Sequence[Any]) -> list[Any]:
        """The arguments with tensors, or what stands for them."""
        rest = iter(tensors)
        return [next(rest) if value is TENSOR else value for value in self.arguments]


TENSOR = object()
"""Stands for a tensor among the arguments of a call."""


class Sizes(list[int]):
    """Numbers that follow from shapes, in calls that take any: of other shapes, the call differs in nothing else."""


TAKES_ANY = ("Expand", "Slice")
"""Operators that do the same whatever their sizes are; a shape to reshape to says how."""


def specialise(program: Program, feeds: Mapping[str, Tensor]) -> Program:
    """Evaluate what follows from shapes.

    Args:
        program: as it was compiled.
        feeds: inputs, whose values are not read.

    Returns:
        A program for inputs of these shapes; all calls of its steps are :class:`Bound`.

    Raises:
        RuntimeError: a size depends on values, or torch cannot tell the shape of a result.
    """
    known: dict[int, Tensor | None] = {0: None}
    from_shapes: set[int] = set()
    examples: dict[int, Tensor] = {
        slot: _example(value) for slot, value in enumerate(program.slots) if value is not None
    }
    for slot in examples:
        value = program.slots[slot]
        if value is not None and value.dtype in (torch.bool, *INTEGERS) and value.numel() <= HOST_CONSTANT:
            known[slot] = value
    examples |= {slot: _example(feeds[name]) for name, slot in program.inputs.items()}
    steps: list[Step] = []
    for step in program.steps:
        reads = HOST_INPUTS.get(step.operator, set())
        numbers = {i: known.get(slot, program.slots[slot]) for i, slot in enumerate(step.inputs) if i in reads}
        if any(value is None and step.inputs[i] for i, value in numbers.items()):
            raise NotStaticError(f"{step.label} reads numbers that depend on more than shapes")
        follows = step.operator in ("Shape", "Size")
        if follows:
            found, are_known = _tensors(step.call(*[examples[slot] for slot in step.inputs])), True
        else:
            sized = {i for i, slot in enumerate(step.inputs) if slot in from_shapes}
            call = _bound(step, numbers | {i: None for i, slot in enumerate(step.inputs) if not slot}, sized)
            rest = tuple(slot for i, slot in enumerate(step.inputs) if i not in reads and slot)
            are_known = all(slot in known for slot in rest)
            found = _tensors(call(*[known[slot] if are_known else examples[slot] for slot in rest]))
            are_known &= step.operator == "Range" or all(result.numel() <= LARGEST for result in found)
            follows = bool(sized)
            if not are_known:
                steps.append(step._replace(call=call, inputs=rest))
        for slot, result in zip(step.outputs, found, strict=True):
            examples[slot] = _example(result)
            if are_known:
                known[slot] = result
            if are_known and follows:
                from_shapes.add(slot)
    ends = {*program.outputs.values()}
    read = {slot for step in steps for slot in step.inputs} | ends
    slots = [known.get(slot, value) if slot in read else value for slot, value in enumerate(program.slots)]
    constants = [slot for slot, value in enumerate(slots) if value is not None]
    return program._replace(slots=slots, steps=schedule(steps, ends, constants))


def _example(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _tensors(result: Any) -> Sequence[Tensor]:
    return [result] if isinstance(result, Tensor) else result


def _bound(step: Step, numbers: Mapping[int, Tensor | None], sized: Collection[int]) -> Bound:
    """A step's call with what it reads on the host, by position, as numbers; which of these follow from shapes."""
    values: dict[int, Any] = {i: None if value is None else value.tolist() for i, value in numbers.items()}
    if step.operator in TAKES_ANY:
        values |= {i: Sizes(values[i]) for i in sized if isinstance(values.get(i), list)}
    arguments = tuple(values.get(i, TENSOR) for i in range(len(step.inputs)))
    if isinstance(step.call, partial):
        return Bound(step.call.func, arguments, step.call.keywords)
    return Bound(step.call, arguments, {})
