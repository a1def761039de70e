"""A network as a short graph of calls to its traced blocks, initializers named and weightless.

The network's own ``forward`` is recorded with every child as one opaque call (``torch.fx``), so it is written once and
serves as the reference in the tests as well as the plan of the graph. Two runs on the meta device at different sizes
tell which sides are free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import getitem
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from zimgkit.engines.bundle import TensorSpec
from zimgkit.engines.tensors.dtypes import BY_NAME
from zimgkit.engines.tensors.safetensors import TensorInfo
from zimgkit.export.graphs.external import external
from zimgkit.export.graphs.trace import DOMAIN, IR_VERSION, OPSET, Example, Kind, cast_parameters
from zimgkit.export.graphs.traces import traced
from zimgkit.export.networks.parts import Input


class _Children(fx.Tracer):
    """Records calls of children, whatever they are, without looking inside."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _Recorder(fx.Interpreter):
    """Runs the recorded calls on the meta device and keeps every result."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.results: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.results[n] = result
        return result


def assemble(
    network: nn.Module,
    inputs: Sequence[Input],
    output: str,
    sizes: tuple[Mapping[str, int], Mapping[str, int]],
    tensors: Mapping[str, TensorInfo],
    folder: Path | None = None,
) -> tuple[ir.Model, TensorSpec]:
    """Build a network's ONNX model; no weight is read.

    Args:
        network: on the meta device, in the element type it computes in. Its ``forward`` only calls its children.
        inputs: the network's inputs, in order.
        output: a name for its one output.
        sizes: two values for each free side. The first is traced, so it should be none the code treats specially.
        tensors: by the network's parameter names, where the data lies; ``TensorInfo.name`` names the initializer.
        folder: where the graph will lie, to which its references to files are relative; by default beside each of them.

    Returns:
        The model and the specification of its output.
    """
    plan = fx.GraphModule(network, _Children().trace(network))
    runs = (_Recorder(plan), _Recorder(plan))
    with torch.no_grad():
        for run, size in zip(runs, sizes, strict=True):
            run.run(*(entry.example(size) for entry in inputs))
    graph = _Assembly(network, runs, tensors, folder)
    graph.trace([node for node in plan.graph.nodes if node.op == "call_module"])
    names = iter(inputs)
    result: ir.Value | None = None
    for node in plan.graph.nodes:
        if node.op == "placeholder":
            graph.known[node] = _value(entry := next(names), entry.dtype)
        elif node.op == "get_attr":
            graph.known[node] = graph.parameter(node)
        elif node.op == "call_function" and node.target is getitem:
            graph.known[node] = graph.known[node.args[0]][node.args[1]]
        elif node.op == "call_module":
            graph.call(node)
        elif node.op == "output":
            result = graph.known[node.args[0]]
        else:
            raise RuntimeError(f"{type(network).__name__}.forward does more than call its children: {node}")
    if result is None:
        raise RuntimeError(f"{type(network).__name__} has no output")
    last = next(iter(reversed(plan.graph.nodes))).args[0]
    spec = TensorSpec("float32", _free_sides([run.results[last] for run in runs], sizes))
    result.name, result.shape = output, ir.Shape(spec.shape)
    heads = [graph.known[node] for node in plan.graph.nodes if node.op == "placeholder"]
    return graph.model(type(network).__name__, heads, result), spec


def _value(entry: Input, dtype: torch.dtype) -> ir.Value:
    kind = ir.TensorType(ir.DataType(BY_NAME[_name(dtype)].onnx))
    return ir.Value(name=entry.name, shape=ir.Shape(entry.shape), type=kind)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Assembly:
    """The graph while it grows: nodes, initializers, and one function per kind of child."""

    def __init__(
        self, network: nn.Module, runs: Sequence[_Recorder], tensors: Mapping[str, TensorInfo], folder: Path | None
    ) -> None:
        self.network = network
        self.runs = runs
        self.tensors = tensors
        self.folder = folder
        self.known: dict[fx.Node, Any] = {}
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.functions: dict[fx.Node, ir.Function] = {}

    def initializer(self, parameter: str) -> ir.Value:
        """The initializer of one parameter: a name, a type, a shape, and a byte range in a weight file."""
        if parameter not in self.initializers:
            info = self.tensors[parameter]
            data = external(info, self.folder or info.file.parent)
            value = ir.Value(name=info.name, shape=data.shape, type=ir.TensorType(data.dtype), const_value=data)
            self.initializers[parameter] = value
        return self.initializers[parameter]

    def parameter(self, node: fx.Node) -> ir.Value:
        """A parameter of the network itself, in the element type it computes in."""
        name, computed = str(node.target), _name(self.runs[0].results[node].dtype)
        value = self.initializer(name)
        if self.tensors[name].dtype == computed:
            return value
        cast = ir.node("Cast", [value], {"to": ir.DataType(BY_NAME[computed].onnx)}, name=f"{name}_{computed}")
        cast.outputs[0].name = cast.name
        self.nodes.append(cast)
        return cast.outputs[0]

    def trace(self, calls: Sequence[fx.Node]) -> None:
        """Trace each kind of child once."""
        kinds: dict[tuple[Any, ...], tuple[Kind, tuple[str, ...]]] = {}
        keys = {}
        for node in calls:
            child = self.network.get_submodule(str(node.target))
            examples = tuple(self._example(argument) for argument in node.all_input_nodes)
            stored = tuple(self.tensors[f"{node.target}.{name}"].dtype for name in child.state_dict())
            shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in child.state_dict().items())
            sides = tuple((example.tensor.dtype, _sides(example)) for example in examples)
            keys[node] = key = (type(child), *_settings(child), sides, shapes, stored)
            if key not in kinds:
                base = type(child).__name__
                count = sum(kind.name.split("_")[0] == base for kind, _ in kinds.values())
                name = f"{base}_{count + 1}" if count else base
                kinds[key] = Kind(name, child, examples, len(_tuple(self.runs[0].results[node]))), stored
        functions = dict(zip(kinds, traced([kind for kind, _ in kinds.values()]), strict=True))
        for key, (kind, stored) in kinds.items():
            cast_parameters(functions[key], kind, stored)
        self.functions = {node: functions[key] for node, key in keys.items()}

    def call(self, node: fx.Node) -> None:
        """Add a call of one child."""
        results = _tuple(self.runs[0].results[node])
        call = ir.Node(
            DOMAIN,
            self.functions[node].name,
            [*(self.known[argument] for argument in node.all_input_nodes), *self._parameters(node)],
            num_outputs=len(results),
            name=str(node.target),
        )
        for index, (value, result) in enumerate(zip(call.outputs, results, strict=True)):
            value.name = node.name if len(results) == 1 else f"{node.name}_{index}"
            value.type = ir.TensorType(ir.DataType(BY_NAME[_name(result.dtype)].onnx))
        self.known[node] = call.outputs if isinstance(self.runs[0].results[node], tuple) else call.outputs[0]
        self.nodes.append(call)

    def _parameters(self, node: fx.Node) -> list[ir.Value]:
        """The initializers a call of a child takes."""
        names = self.network.get_submodule(str(node.target)).state_dict()
        return [self.initializer(f"{node.target}.{name}") for name in names]

    def _example(self, argument: fx.Node) -> Example:
        """What a call gets, with the sides free that differ between the two runs."""
        first, second = (run.results[argument] for run in self.runs)
        return Example(first, _differing(first, second))

    def model(self, name: str, inputs: Sequence[ir.Value], output: ir.Value) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            inputs,
            [output],
            nodes=self.nodes,
            initializers=tuple(self.initializers.values()),
            opset_imports={"": OPSET, DOMAIN: 1},
            name=name,
        )
        functions = list(dict.fromkeys(self.functions.values()))
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="zimg", functions=functions)


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _differing(first: Tensor, second: Tensor) -> tuple[int, ...]:
    return tuple(axis for axis, (a, b) in enumerate(zip(first.shape, second.shape, strict=True)) if a != b)


def _sides(example: Example) -> tuple[int | None, ...]:
    return tuple(None if axis in example.free else side for axis, side in enumerate(example.tensor.shape))


def _settings(child: nn.Module) -> tuple[Any, ...]:
    """What makes two children the same kind: their classes and their plain settings, wherever they stand."""
    return tuple(
        (name, type(module).__qualname__, key, repr(value))
        for name, module in child.named_modules()
        for key, value in sorted(vars(module).items())
        if not key.startswith("_") and key != "layer_idx" and isinstance(value, (bool, int, float, str, list, tuple))
    )


def _free_sides(results: Sequence[Tensor], sizes: Sequence[Mapping[str, int]]) -> tuple[int | str, ...]:
    """Name the sides of an output that follow a free side of the inputs, as ``name`` or ``8*name``."""

    def side(first: int, second: int) -> int | str:
        if first == second:
            return first
        for factor in (1, 8):
            for name in sizes[0]:
                if (first, second) == (factor * sizes[0][name], factor * sizes[1][name]):
                    return name if factor == 1 else f"{factor}*{name}"
        raise RuntimeError(f"an output side of {first} and {second} follows none of {dict(sizes[0])}, {dict(sizes[1])}")

    return tuple(side(first, second) for first, second in zip(*(tuple(r.shape) for r in results), strict=True))
