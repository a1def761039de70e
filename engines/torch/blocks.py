"""``torch.compile``, once for each kind of block: the calls of one function, whose weights are arguments."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import getitem
from typing import Any, cast

import torch
from torch import Tensor, fx

from zimgkit.engines.torch.graph import Program, Step, schedule
from zimgkit.engines.torch.specialised import Bound, Sizes

Kinds = dict[str, Callable[..., Any]]
"""What tells a kind of block from others -> a faster function of its inputs, of any shape."""


def by_block(program: Program, kinds: Kinds) -> Program:
    """A program with one step for each call of a function.

    Args:
        program: as :func:`.specialised.specialise` gives it.
        kinds: what was compiled; new kinds are added. What follows from shapes are arguments, so one serves them all.
    """
    groups = [list(steps) for _, steps in groupby(program.steps, key=lambda step: step.block)]
    steps, wanted = [], {*program.outputs.values()}
    for group in reversed(groups):
        inputs, outputs = _borders(group, wanted)
        kind, sizes = describe(group, inputs, outputs)
        if kind not in kinds:
            kinds[kind] = compile_block(module_of(group, inputs, outputs))
        first = group[0]
        call = _Block(kinds[kind], sizes)
        steps.append(Step(call, inputs, outputs, (), first.block or first.label, first.block))
        wanted |= {*inputs}
    constants = [slot for slot, value in enumerate(program.slots) if value is not None]
    return program._replace(steps=schedule(steps[::-1], {*program.outputs.values()}, constants))


def compile_block(module: fx.GraphModule) -> Callable[..., Any]:
    """``torch.compile``, without a break of the graph and for all shapes."""
    compiled: Callable[..., Any] = torch.compile(module, fullgraph=True, dynamic=True)
    return compiled


@dataclass(frozen=True)
class _Block:
    """A call of what was compiled."""

    function: Callable[..., Any]
    sizes: tuple[int, ...]

    def __call__(self, *tensors: Tensor) -> Any:
        return self.function(*tensors, *self.sizes)


def _borders(steps: Sequence[Step], wanted: Collection[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What some steps read that is not their own, and what of theirs is wanted, each in the order in which it comes."""
    made = dict.fromkeys(slot for step in steps for slot in step.outputs)
    inputs = dict.fromkeys(slot for step in steps for slot in step.inputs if slot not in made)
    return tuple(inputs), tuple(slot for slot in made if slot in wanted)


def describe(steps: Sequence[Step], inputs: Sequence[int], outputs: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """All that tells one group of steps from another, but for tensors and sizes; and its sizes."""
    numbers = {slot: number for number, slot in enumerate(inputs)}
    lines: list[Any] = []
    sizes: list[int] = []
    for step in steps:
        call: Bound = cast("Bound", step.call)
        arguments = call.filled([f"tensor {numbers[slot]}" for slot in step.inputs])
        for position, value in enumerate(arguments):
            if isinstance(value, Sizes):
                sizes += value
                arguments[position] = f"{len(value)} sizes"
        for slot in step.outputs:
            numbers[slot] = len(numbers)
        lines.append((id(call.function), arguments, sorted(call.keywords.items())))
    return repr((lines, [numbers[slot] for slot in outputs])), tuple(sizes)


def module_of(steps: Sequence[Step], inputs: Sequence[int], outputs: Sequence[int]) -> fx.GraphModule:
    """Some steps, whose calls are :class:`.specialised.Bound`, as a function: straight Python, one line a step.

    Args:
        steps: in the order in which they run.
        inputs: the slots of its first arguments, which are tensors; all sizes of the steps are the others.
        outputs: the slots of its results; of one, no tuple.
    """
    graph = fx.Graph()
    nodes = {slot: graph.placeholder(f"tensor_{number}") for number, slot in enumerate(inputs)}
    sizes = [value for step in steps for value in cast("Bound", step.call).arguments if isinstance(value, Sizes)]
    rest = iter([graph.placeholder(f"size_{number}") for number in range(sum(map(len, sizes)))])
    for step in steps:
        call = cast("Bound", step.call)
        arguments = call.filled([nodes[slot] for slot in step.inputs])
        arguments = [[next(rest) for _ in value] if isinstance(value, Sizes) else value for value in arguments]
        result = graph.call_function(call.function, tuple(arguments), dict(call.keywords))
        if len(step.outputs) == 1 and step.operator != "Split":
            nodes[step.outputs[0]] = result
            continue
        for number, slot in enumerate(step.outputs):
            nodes[slot] = graph.call_function(getitem, (result, number))
    found = tuple(nodes[slot] for slot in outputs)
    graph.output(found[0] if len(found) == 1 else found)
    return fx.GraphModule({}, graph)
