"""A network's recorded calls of its children: what a graph is assembled from, and what attachments rewrite before.

A network's own ``forward`` is recorded with every child as one opaque call (``torch.fx``), so it is written once and
serves as the reference in the tests as well as the plan of the graph. Runs on the meta device at two different sizes
tell which dimensions are dynamic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, fx, nn

from zimgkit.export.networks.parts import Input

Sizes = tuple[Mapping[str, int], Mapping[str, int]]
"""Two lengths of each dynamic dimension. The first is traced, so it should be none the code treats specially."""
TRACING = Lock()
"""PyTorch traces in one thread at a time: what it patches meanwhile is the process's."""
Results = Mapping[fx.Node, Any]
"""What each recorded node gave in a run: tensors on the meta device."""


@dataclass(frozen=True)
class Plan:
    """Calls of modules, in order, from inputs to outputs. Never changed: what rewrites one makes another."""

    name: str
    """Of the graph that it becomes."""
    graph: fx.Graph
    """Nodes of four kinds: inputs, parameters of the network itself, calls of modules, and items of their results."""
    modules: Mapping[str, nn.Module]
    """What is called, by the name that its parameters' names begin with; on the meta device."""
    own: Mapping[str, Tensor]
    """The parameters that calls take as arguments, by name."""
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    """Names for what the graph returns, in order."""
    sizes: Sizes

    def run(self, which: int) -> Results:
        """Run all calls on the meta device, at the first or the second of the sizes."""
        run = _Run(self)
        with torch.no_grad():
            run.run(*(entry.example(self.sizes[which]) for entry in self.inputs))
        return run.results

    def module(self) -> fx.GraphModule:
        """All of it as one module, whose parameters have the names that they have here."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        for node in graph.find_nodes(op="placeholder"):
            node.target = node.name  # It becomes the name of an argument, which has no dots.
        return fx.GraphModule({**self.modules, **self.own}, graph)

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The nodes whose values are returned."""
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        return _tuple(output.args[0])

    @property
    def calls(self) -> tuple[fx.Node, ...]:
        """The calls, in order."""
        return tuple(node for node in self.graph.nodes if node.op == "call_module")

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of all parameters that it takes."""
        found = {name: tuple(value.shape) for name, value in self.own.items()}
        for target in dict.fromkeys(str(node.target) for node in self.calls):
            found |= {f"{target}.{name}": tuple(v.shape) for name, v in self.modules[target].state_dict().items()}
        return found


class _Children(fx.Tracer):
    """Records calls of children, whatever they are, without looking inside.

    What it patches meanwhile is the process's: modules that other threads call come here too, and are just run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


class _Run(fx.Interpreter):
    """Runs a plan and keeps every result."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(nn.Module(), graph=plan.graph)
        self._plan = plan
        self.results: dict[fx.Node, Any] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._plan.modules[target](*args, **kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._plan.own[target]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.results[n] = result
        return result


def record(network: nn.Module, inputs: Sequence[Input], outputs: Sequence[str], sizes: Sizes) -> Plan:
    """Record what a network's ``forward`` calls.

    Args:
        network: on the meta device, in the element type it computes in.
        inputs: its inputs, in order.
        outputs: names for its results: the one that ``forward`` returns, or those of the tuple.
        sizes: two lengths of each dynamic dimension.

    Raises:
        RuntimeError: ``forward`` does more than call its children, or returns another number of results; a bug in a
            network, never a user's fault.
    """
    name = type(network).__name__
    with TRACING:
        graph = _Children().trace(network)
    for node in graph.nodes:
        is_item = node.op == "call_function" and node.target is getitem
        if node.op not in ("placeholder", "get_attr", "call_module", "output") and not is_item:
            raise RuntimeError(f"{name}.forward does more than call its children: {node}")
    parameters = {str(node.target): network.get_parameter(str(node.target)) for node in graph.find_nodes(op="get_attr")}
    modules = {str(node.target): network.get_submodule(str(node.target)) for node in graph.find_nodes(op="call_module")}
    plan = Plan(name, graph, modules, parameters, tuple(inputs), tuple(outputs), sizes)
    if len(plan.results) != len(plan.outputs):
        raise RuntimeError(f"{name} returns {len(plan.results)} results, and has {len(plan.outputs)} names for them")
    return plan


FORMS = {(1, 1): "{}", (8, 1): "8*{}", (1, 8): "{}/8"}
"""Many of a part of a dimension of the inputs -> how it is written."""


def dynamic_axes(first: Tensor, second: Tensor) -> tuple[int, ...]:
    """The axes along which a value differs between two runs."""
    return tuple(axis for axis, (a, b) in enumerate(zip(first.shape, second.shape, strict=True)) if a != b)


def named_shape(first: Tensor, second: Tensor, sizes: Sizes) -> tuple[int | str, ...]:
    """The shape of a value, its dynamic dimensions named after those of the inputs: ``name``, ``8*name`` or ``name/8``.

    Args:
        first: the value in a run at the first of the sizes.
        second: likewise at the second.
        sizes: of the plan.

    Raises:
        RuntimeError: a dimension follows none of the inputs'.
    """

    def name(a: int, b: int) -> int | str:
        if a == b:
            return a
        for (many, part), form in FORMS.items():
            for known in sizes[0]:
                if (a * part, b * part) == (many * sizes[0][known], many * sizes[1][known]):
                    return form.format(known)
        raise RuntimeError(f"a dimension of {a} and {b} follows none of {dict(sizes[0])}, {dict(sizes[1])}")

    return tuple(name(a, b) for a, b in zip(first.shape, second.shape, strict=True))


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
