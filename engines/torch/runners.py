"""What runs a program: step by step, compiled by block, or as a CUDA graph; prepared once for each set of shapes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from zimgkit.engines.torch.blocks import Kinds, by_block
from zimgkit.engines.torch.cuda_graph import Runner, recorded_when_met_again
from zimgkit.engines.torch.graph import Program, run
from zimgkit.engines.torch.specialised import specialise

SHAPES = 8
"""Sets of shapes that stay prepared: those met last."""

Shapes = tuple[tuple[int, ...], ...]


class Runners:
    """Runs one program on inputs of any shapes.

    Args:
        program: as it was compiled.
        compiled: whether each kind of block goes through ``torch.compile``.
        recorded: whether what is met a second time is recorded as a CUDA graph.
    """

    def __init__(self, program: Program, *, compiled: bool = False, recorded: bool = False) -> None:
        self._program, self._compiled, self._recorded = program, compiled, recorded
        self._kinds: Kinds = {}
        self._prepared: dict[Shapes, Runner] = {}
        """The one used last is last."""
        self._pool = torch.cuda.graph_pool_handle() if recorded else None

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run inputs, by name. The next run may overwrite what it gives."""
        if not (self._compiled or self._recorded):
            return run(self._program, feeds)
        shapes = tuple(tuple(feeds[name].shape) for name in self._program.inputs)
        runner = self._prepared.pop(shapes, None) or self._prepare(feeds)
        self._prepared[shapes] = runner
        while len(self._prepared) > SHAPES:
            del self._prepared[next(iter(self._prepared))]
        return runner(feeds)

    def _prepare(self, feeds: Mapping[str, Tensor]) -> Runner:
        if not self._compiled:
            return recorded_when_met_again(self._program, partial(specialise, self._program), self._pool)
        # At once: if the first run were another, a picture would depend on what was drawn before.
        program = by_block(specialise(self._program, feeds), self._kinds)
        return (
            recorded_when_met_again(program, lambda _: program, self._pool) if self._recorded else partial(run, program)
        )
