"""Plans: what is recorded of a network, and what is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from torch import nn

from zimgkit.export.graphs.plan import named_shape, record
from zimgkit.export.networks.parts import Input

SIZES = ({"tokens": 6}, {"tokens": 10})
INPUTS = (Input("x", torch.float32, ("tokens", 4)),)


class Toy(nn.Module):
    """A parameter of its own, and a child that is called twice."""

    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.empty(4))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y + self.bias

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, 4))
        self.add = self.Add()
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.add(self.add(x, self.token), x)


def test_what_is_recorded():
    with torch.device("meta"):
        plan = record(Toy(), INPUTS, ("y",), SIZES)
    assert plan.name == "Toy" and plan.outputs == ("y",)
    assert [node.target for node in plan.calls] == ["add", "add"]
    assert plan.parameters() == {"token": (1, 4), "add.bias": (4,)}
    first, second = (plan.run(which)[plan.results[0]] for which in (0, 1))
    assert (first.shape, second.shape) == ((6, 4), (10, 4))
    assert named_shape(first, second, SIZES) == ("tokens", 4)


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.child(x) * 2


def test_a_network_only_calls_its_children():
    with pytest.raises(RuntimeError, match="more than call its children"):
        record(Doubles(), INPUTS, ("y",), SIZES)


def test_names_for_other_outputs():
    with pytest.raises(RuntimeError, match="Toy returns 1 results, and has 2 names for them"):
        record(Toy(), INPUTS, ("y", "z"), SIZES)


def test_a_dimension_of_nobody():
    first, second = torch.empty(7), torch.empty(8)
    with pytest.raises(RuntimeError, match="a dimension of 7 and 8 follows none of"):
        named_shape(first, second, SIZES)


class Waits(Toy):
    """In the middle of its forward, until another thread is done."""

    def __init__(self, begun: Event, done: Event) -> None:
        super().__init__()
        self.begun, self.done = begun, done

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.begun.set()
        assert self.done.wait(60)
        return super().forward(x)


def test_other_threads_run_modules_meanwhile():
    begun, done = Event(), Event()
    with torch.device("meta"):
        network, other = Waits(begun, done), record(Toy(), INPUTS, ("y",), SIZES)
    with ThreadPoolExecutor(1) as pool:
        recording = pool.submit(record, network, INPUTS, ("y",), SIZES)
        assert begun.wait(60)
        results = other.run(1)
        ran = nn.Linear(4, 2)(torch.zeros(3, 4))
        done.set()
        plan = recording.result()
    assert results[other.results[0]].shape == (10, 4) and ran.shape == (3, 2)
    assert [node.target for node in plan.calls] == ["add", "add"]


def test_several_at_once():
    call = nn.Module.__call__

    def make(_: int) -> list[str]:
        with torch.device("meta"):
            network = Toy()
        return [str(node.target) for node in record(network, INPUTS, ("y",), SIZES).calls]

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(make, range(40))] == [["add", "add"]] * 40
    assert nn.Module.__call__ is call
