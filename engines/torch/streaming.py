"""Weights of blocks copied to the device while the blocks before them run, where it has no room for all of them.

They lie in the host's memory; a ring of buffers on the device, each for one block, holds those of the block that runs
and of the next. Untested on a GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zimgkit.engines.torch.graph import Program, Step, schedule

BUFFERS = 2
"""Of the ring: one that is read and one that is filled."""
ALIGNMENT = 256
"""Bytes that a tensor begins at a multiple of, as kernels want it."""
COPY_WEIGHTS = "a copy of weights to the device"
"""The label of steps that are no node's."""
LEAST = 1 << 16
"""Bytes of a constant that is streamed; smaller ones stay on the device."""


def stays_on_host(tensor: Tensor) -> bool:
    """Whether a constant may be streamed."""
    return tensor.nbytes >= LEAST


def stream_weights(program: Program, budget: int, device: torch.device) -> Program:
    """Stream as few blocks as a budget needs: the last ones; the first ones stay on the device.

    Args:
        program: whose constants that may be streamed lie in the host's memory.
        budget: bytes of weights on the device, the ring's included.
        device: where it runs.

    Returns:
        A program that puts the weights of each block that is streamed in their slots before it runs. What no block has
        to itself stays on the device, whatever the budget.
    """
    blocks = _own_weights(program)
    sizes = {block: _bytes([_present(program, slot) for slot in slots]) for block, slots in blocks.items()}
    room = budget - sum(_bytes([value]) for value in program.slots if value is not None) + sum(sizes.values())
    resident = [*blocks]
    while resident and sum(sizes[block] for block in resident) + _ring_bytes(sizes, resident) > room:
        resident.pop()
    streamed = {block: slots for block, slots in blocks.items() if block not in resident}
    leaving = {slot for slots in streamed.values() for slot in slots}
    slots = [
        None if slot in leaving else value if value is None or not stays_on_host(value) else value.to(device)
        for slot, value in enumerate(program.slots)
    ]
    if not streamed:
        return program._replace(slots=slots)
    ring = Ring([[_present(program, slot) for slot in own] for own in streamed.values()], device)
    order = {block: number for number, block in enumerate(streamed)}
    steps: list[Step] = []
    for step in program.steps:
        if step.block in order and (not steps or steps[-1].block != step.block):
            enter = partial(ring.enter, order[step.block])
            steps.append(Step(enter, (), tuple(streamed[step.block]), (), COPY_WEIGHTS, step.block))
        steps.append(step)
    constants = [slot for slot, value in enumerate(slots) if value is not None]
    return program._replace(slots=slots, steps=schedule(steps, {*program.outputs.values()}, constants))


def _own_weights(program: Program) -> dict[str, list[int]]:
    """Block -> the slots of constants that may be streamed and that nothing else reads, in the order of the blocks.

    A block whose steps do not stand together has none.
    """
    readers: dict[int, set[str]] = defaultdict(set)
    runs: dict[str, int] = defaultdict(int)
    for number, step in enumerate(program.steps):
        for slot in step.inputs:
            readers[slot].add(step.block)
        runs[step.block] += not number or program.steps[number - 1].block != step.block
    for slot in program.outputs.values():
        readers[slot].add("")
    found: dict[str, list[int]] = {block: [] for block, count in runs.items() if block and count == 1}
    for slot, value in enumerate(program.slots):
        if value is not None and stays_on_host(value) and len(readers[slot]) == 1:
            (block,) = readers[slot]
            if block in found:
                found[block].append(slot)
    return {block: slots for block, slots in found.items() if slots}


def _present(program: Program, slot: int) -> Tensor:
    value = program.slots[slot]
    if value is None:
        raise ValueError(f"slot {slot} holds no constant")
    return value


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)


def _ring_bytes(sizes: dict[str, int], resident: Sequence[str]) -> int:
    return BUFFERS * max((size for block, size in sizes.items() if block not in resident), default=0)


class Ring:
    """Buffers on a device that the weights of blocks take in turn, over and over, as the blocks run in turn.

    Args:
        blocks: the weights of each, in the host's memory.
        device: where they are to be. On CUDA copies of them are pinned, and go there on a stream of their own.
    """

    def __init__(self, blocks: Sequence[Sequence[Tensor]], device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._blocks = [[tensor.pin_memory() if self._cuda else tensor for tensor in block] for block in blocks]
        size = max(map(_bytes, blocks))
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]
        self._entered = self._fetched = 0
        """How many blocks were begun, and how many fetched, since the start."""
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._read: list[Any] = [torch.cuda.Event() if self._cuda else None for _ in range(BUFFERS)]  # type: ignore[no-untyped-call]
        self._filled: list[Any] = [torch.cuda.Event() if self._cuda else None for _ in range(BUFFERS)]  # type: ignore[no-untyped-call]

    def enter(self, number: int) -> tuple[Tensor, ...]:
        """The weights of a block that is about to run; it has ended when another one is entered.

        Meanwhile those of the next are fetched, of the first after the last.
        """
        count = len(self._blocks)
        if self._entered % count != number:
            # A run before ended early. What was fetched is not what is needed.
            self._entered = self._fetched = (self._fetched // count + 1) * count + number
            ended = range(BUFFERS)
        else:
            ended = range(self._entered - 1, self._entered)
        for place in ended if self._cuda else ():
            self._read[place % BUFFERS].record()
        while self._fetched < self._entered + BUFFERS:
            self._fetch()
        place = self._entered % BUFFERS
        if self._cuda:
            torch.cuda.current_stream().wait_event(self._filled[place])
        self._entered += 1
        return tuple(self._views(number, place))

    def _fetch(self) -> None:
        number, place = self._fetched % len(self._blocks), self._fetched % BUFFERS
        if self._cuda:
            self._stream.wait_event(self._read[place])
        with torch.cuda.stream(self._stream):
            for view, tensor in zip(self._views(number, place), self._blocks[number], strict=True):
                view.copy_(tensor, non_blocking=True)
        if self._cuda:
            self._filled[place].record(self._stream)
        self._fetched += 1

    def _views(self, number: int, place: int) -> list[Tensor]:
        views, offset = [], 0
        for tensor in self._blocks[number]:
            flat = self._buffers[place][offset : offset + tensor.nbytes]
            views.append(flat.view(tensor.dtype).view(tensor.shape))
            offset += _bytes([tensor])
        return views
