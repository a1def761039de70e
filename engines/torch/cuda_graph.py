"""A program recorded as a CUDA graph, which the device runs without asking the host. Untested on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zimgkit.engines.errors import is_out_of_memory
from zimgkit.engines.torch.graph import Program, run

Runner = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Runs inputs of the shapes that it was made for. Of a CUDA graph, the next run overwrites what it gives."""


def recorded_when_met_again(program: Program, fold: Callable[[Mapping[str, Tensor]], Program], pool: Any) -> Runner:
    """Run a program step by step once, and record it when there is a second run: much is run once for a picture.

    Args:
        program: it.
        fold: makes of inputs the program for their shapes, see :func:`.specialised.specialise`.
        pool: the memory of several graphs of which one runs at a time; ``torch.cuda.graph_pool_handle()``.

    Returns:
        What runs inputs of the shapes that it is first given. What cannot be recorded goes on step by step.
    """
    runners: list[Runner] = []

    def runner(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not runners:
            runners.append(partial(run, program))
            return run(program, feeds)
        if len(runners) == 1:
            try:
                runners.append(_record(fold(feeds), feeds, pool))
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                runners.append(runners[0])
        return runners[-1](feeds)

    return runner


def _record(program: Program, feeds: Mapping[str, Tensor], pool: Any) -> Runner:
    inputs = {name: feed.clone() for name, feed in feeds.items()}
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        run(program, inputs)  # What libraries allocate in their first call may not be recorded.
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads go on using the device meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = run(program, inputs)

    def replay(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, place in inputs.items():
            place.copy_(feeds[name])
        graph.replay()
        return outputs

    return replay
