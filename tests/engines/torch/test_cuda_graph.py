"""What is recorded as a CUDA graph and when, over an imitation of CUDA's; on a GPU untested."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engines.torch.test_blocks import lengths, two_layers
from zimgkit.engines.torch import blocks, cuda_graph
from zimgkit.engines.torch.graph import Program, compile_graph, read_constant, run
from zimgkit.engines.torch.runners import SHAPES, Runners


class Cuda:
    """Records what is run within ``graph``, and computes it again into the same tensors when it is replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: RuntimeError | None = None
        self.recorded: list[Any] = []
        self.replays = 0
        self._last: Any = None
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "current_stream": lambda: stream,
            "Stream": lambda: stream,
            "stream": lambda _: nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=None),
            "graph": self.graph,
            "graph_pool_handle": lambda: "pool",
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(cuda_graph, "run", self.run)

    def run(self, program: Program, feeds: Any) -> Any:
        self._last = (program, feeds, run(program, feeds))
        return self._last[-1]

    @contextmanager
    def graph(self, graph: Any, *, pool: str, capture_error_mode: str) -> Any:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        if self.error:
            raise self.error
        yield
        program, inputs, outputs = self._last
        self.recorded.append(program)

        def replay() -> None:
            self.replays += 1
            for name, value in run(program, inputs).items():
                outputs[name].copy_(value)

        graph.replay = replay


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    monkeypatch.setattr(blocks, "compile_block", lambda module: module)
    return Cuda(monkeypatch)


@pytest.fixture
def program() -> Program:
    return compile_graph(two_layers(), partial(read_constant, None, ""), torch.device("cpu"))


def check(runner: Runners, program: Program, x: int, z: int) -> None:
    feeds = lengths(x, z)
    before = {name: feed.clone() for name, feed in feeds.items()}
    torch.testing.assert_close(runner(feeds)["y"], run(program, feeds)["y"])
    assert all(torch.equal(before[name], feed) for name, feed in feeds.items())


@pytest.mark.parametrize("compiled", [False, True])
@torch.inference_mode()
def test_what_is_met_again_is_recorded_once(cuda: Cuda, program: Program, compiled: bool) -> None:
    runner = Runners(program, compiled=compiled, recorded=True)
    for sizes, recorded, replays in (
        ((7, 5), 0, 0),
        ((9, 6), 0, 0),
        ((7, 5), 1, 1),
        ((7, 5), 1, 2),
        ((9, 6), 2, 3),
        ((7, 5), 2, 4),
    ):
        check(runner, program, *sizes)
        assert (len(cuda.recorded), cuda.replays) == (recorded, replays)
    # Nothing that is recorded reads a size on the host.
    assert all(not {step.operator for step in each.steps} & {"Shape", "Range"} for each in cuda.recorded)


@torch.inference_mode()
def test_graphs_of_few_shapes_are_kept(cuda: Cuda, program: Program) -> None:
    runner = Runners(program, recorded=True)
    for length in [each for each in range(2, 16) for _ in range(2)]:
        check(runner, program, length + 1, length)
    assert len(cuda.recorded) == 14 and len(runner._prepared) == SHAPES
    check(runner, program, 3, 2)
    assert cuda.replays == 14


@torch.inference_mode()
def test_what_cannot_be_recorded_is_run_step_by_step(cuda: Cuda, program: Program) -> None:
    cuda.error = RuntimeError("CUDA error: operation not permitted when stream is capturing")
    runner = Runners(program, recorded=True)
    for _ in range(3):
        check(runner, program, 7, 5)
    assert not cuda.recorded and not cuda.replays


@torch.inference_mode()
def test_a_full_device_is_told_and_tried_again(cuda: Cuda, program: Program) -> None:
    """Whoever is told closes other engines, and runs again."""
    runner = Runners(program, recorded=True)
    check(runner, program, 7, 5)
    cuda.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        runner(lengths(7, 5))
    cuda.error = None
    check(runner, program, 7, 5)
    assert (len(cuda.recorded), cuda.replays) == (1, 1)
