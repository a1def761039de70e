"""Plans as short graphs of calls to traced modules, initializers named and weightless."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from zimgkit.export.graphs.plan import Plan, Results, dynamic_axes, named_shape
from zimgkit.export.graphs.trace import DOMAIN, IR_VERSION, OPSET, Example, Kind, cast_parameters
from zimgkit.export.graphs.traces import traced


@dataclass(frozen=True)
class Assembled:
    """A plan's graph."""

    model: ir.Model
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


def assemble(plan: Plan, tensors: Mapping[str, TensorInfo], folder: Path | None = None) -> Assembled:
    """Build a plan's ONNX model; no weight is read.

    Args:
        plan: what is called.
        tensors: by the names of the plan's parameters, where the data lies; ``TensorInfo.name`` names the initializer.
        folder: where the graph will lie, to which its references to files are relative; by default beside each of them.
    """
    return assemble_all([plan], tensors, folder)[0]


def assemble_all(
    plans: Sequence[Plan],
    tensors: Mapping[str, TensorInfo],
    folder: Path | None = None,
    before: Sequence[Plan] = (),
) -> list[Assembled]:
    """Build the ONNX models of plans that share modules: each kind of module is traced once for all of them.

    Args:
        plans: what is called.
        tensors: see :func:`assemble`.
        folder: likewise.
        before: plans that were assembled together before: of what they have in common with these, the traces of then
            are taken, as long as they are kept.
    """
    kinds: dict[_Key, tuple[Kind, Sequence[str]]] = {}
    for plan in before:
        _Assembly(plan, tensors, folder).collect(kinds)
    first = len(kinds)
    assemblies = [_Assembly(plan, tensors, folder) for plan in plans]
    for assembly in assemblies:
        assembly.collect(kinds)
    every = [kind for kind, _ in kinds.values()]
    made = [function for some in (every[:first], every[first:]) if some for function in traced(some)]
    functions = dict(zip(kinds, made, strict=True))
    for key, (kind, stored) in kinds.items():
        cast_parameters(functions[key], kind, stored)
    return [assembly.finish(functions) for assembly in assemblies]


_Key = tuple[Any, ...]
"""What makes two calls those of one function."""


class _Assembly:
    """One graph while it grows: nodes and initializers."""

    def __init__(self, plan: Plan, tensors: Mapping[str, TensorInfo], folder: Path | None) -> None:
        self._plan, self._tensors, self._folder = plan, tensors, folder
        self._runs: tuple[Results, Results] = (plan.run(0), plan.run(1))
        self._known: dict[fx.Node, Any] = {}
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._keys: dict[fx.Node, _Key] = {}

    def collect(self, kinds: dict[_Key, tuple[Kind, Sequence[str]]]) -> None:
        """Find the kinds of modules that are called.

        Args:
            kinds: those found so far, with the types their parameters are stored in; added to.
        """
        for node in self._plan.calls:
            module = self._plan.modules[str(node.target)]
            examples = tuple(self._example(argument) for argument in node.all_input_nodes)
            stored = tuple(self._tensors[f"{node.target}.{name}"].dtype for name in module.state_dict())
            shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in module.state_dict().items())
            lengths = tuple((example.tensor.dtype, _lengths(example)) for example in examples)
            self._keys[node] = key = (type(module), *_settings(module), lengths, shapes, stored)
            if key not in kinds:
                base = type(module).__name__
                count = sum(kind.name.split("_")[0] == base for kind, _ in kinds.values())
                name = f"{base}_{count + 1}" if count else base
                kinds[key] = Kind(name, module, examples, len(_tuple(self._runs[0][node]))), stored

    def finish(self, functions: Mapping[_Key, ir.Function]) -> Assembled:
        """Add all nodes of the plan and make the model, with copies of the functions that it calls."""
        plan = self._plan
        entries = {entry.name: TensorSpec(_name(entry.dtype), entry.shape) for entry in plan.inputs}
        names = iter(entries.items())
        heads = []
        for node in plan.graph.nodes:
            if node.op == "placeholder":
                heads.append(_value(*next(names)))
                self._known[node] = heads[-1]
            elif node.op == "get_attr":
                self._known[node] = self._parameter(node)
            elif node.op == "call_module":
                self._call(node, functions[self._keys[node]].name)
            elif node.target is getitem:
                self._known[node] = self._known[node.args[0]][node.args[1]]
        results = [self._known[node] for node in plan.results]
        if len({*map(id, results)} | {*map(id, heads)}) < len(results) + len(heads):
            raise RuntimeError(f"{plan.name} returns one value twice, or an input as it is")
        outputs = {}
        for name, node, value in zip(plan.outputs, plan.results, results, strict=True):
            first, second = (run[node] for run in self._runs)
            outputs[name] = TensorSpec(_name(first.dtype), named_shape(first, second, plan.sizes))
            value.name, value.shape = name, ir.Shape(outputs[name].shape)
        graph = ir.Graph(
            heads,
            results,
            nodes=self._nodes,
            initializers=tuple(self._initializers.values()),
            opset_imports={"": OPSET, DOMAIN: 1},
            name=plan.name,
        )
        called = [functions[key].clone() for key in dict.fromkeys(self._keys.values())]
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name=DOMAIN, functions=called)
        return Assembled(model, entries, outputs)

    def _initializer(self, parameter: str) -> ir.Value:
        """The initializer of one parameter: a name, a type, a shape, and a byte range in a weight file."""
        if parameter not in self._initializers:
            info = self._tensors[parameter]
            data = external(info, self._folder or info.file.parent)
            value = ir.Value(name=info.name, shape=data.shape, type=ir.TensorType(data.dtype), const_value=data)
            self._initializers[parameter] = value
        return self._initializers[parameter]

    def _parameter(self, node: fx.Node) -> ir.Value:
        """A parameter of the network itself, in the element type it computes in."""
        name, computed = str(node.target), _name(self._runs[0][node].dtype)
        value = self._initializer(name)
        if self._tensors[name].dtype == computed:
            return value
        cast = ir.node("Cast", [value], {"to": ir.DataType(BY_NAME[computed].onnx)}, name=f"{name}_{computed}")
        cast.outputs[0].name = cast.name
        self._nodes.append(cast)
        return cast.outputs[0]

    def _call(self, node: fx.Node, function: str) -> None:
        """Add a call of one module."""
        results = _tuple(self._runs[0][node])
        names = self._plan.modules[str(node.target)].state_dict()
        parameters = [self._initializer(f"{node.target}.{name}") for name in names]
        # What is called again goes by the name of its result.
        is_known = any(known.name == str(node.target) for known in self._nodes)
        call = ir.Node(
            DOMAIN,
            function,
            [*(self._known[argument] for argument in node.all_input_nodes), *parameters],
            num_outputs=len(results),
            name=node.name if is_known else str(node.target),
        )
        for index, (value, result) in enumerate(zip(call.outputs, results, strict=True)):
            value.name = node.name if len(results) == 1 else f"{node.name}_{index}"
            value.type = ir.TensorType(ir.DataType(BY_NAME[_name(result.dtype)].onnx))
        self._known[node] = call.outputs if isinstance(self._runs[0][node], tuple) else call.outputs[0]
        self._nodes.append(call)

    def _example(self, argument: fx.Node) -> Example:
        """What a call gets; dimensions that differ between the two runs are dynamic."""
        first, second = (run[argument] for run in self._runs)
        return Example(first, dynamic_axes(first, second))


def _value(name: str, spec: TensorSpec) -> ir.Value:
    kind = ir.TensorType(ir.DataType(BY_NAME[spec.dtype].onnx))
    return ir.Value(name=name, shape=ir.Shape(spec.shape), type=kind)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _lengths(example: Example) -> tuple[int | None, ...]:
    return tuple(None if axis in example.dynamic else length for axis, length in enumerate(example.tensor.shape))


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """What makes two modules the same kind: their classes and their plain settings, wherever they stand."""
    return tuple(
        (name, type(part).__qualname__, key, repr(value))
        for name, part in module.named_modules()
        for key, value in sorted(vars(part).items())
        if not key.startswith("_") and key != "layer_idx" and isinstance(value, (bool, int, float, str, list, tuple))
    )
