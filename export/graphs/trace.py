"""One block, its parameters as inputs, to an ONNX function.

A network here is a few kinds of block repeated dozens of times. Each kind is traced once, on the meta device, so no
weight exists in memory, none is folded, renamed or merged, and tracing takes as long for 2 layers as for 60.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn

from zimgkit.engines.tensors.dtypes import BY_NAME
from zimgkit.export.graphs.constant_reshape import ConstantReshape
from zimgkit.export.graphs.nodes import take_over
from zimgkit.export.graphs.plan import TRACING

OPSET = 23
"""The first with ``RMSNormalization``, ``RotaryEmbedding`` and ``Attention``; 24 loses the first in the exporter."""
IR_VERSION = 11
"""The first that knows opset 23."""
DOMAIN = "zimg"
FACTORS = tuple(n for n in range(1009, 1500) if all(n % d for d in range(2, 40)))
"""Primes, one for each module that is traced, above the lengths of all examples, so that no two products are equal."""


@dataclass(frozen=True)
class Example:
    """One tensor input of a block: its example on the meta device, and which of its axes are dynamic."""

    tensor: Tensor
    dynamic: tuple[int, ...]

    def scaled(self, factor: int) -> Tensor:
        """The example with its dynamic dimensions so many times as long; on the meta device that costs nothing."""
        shape = [length * factor if axis in self.dynamic else length for axis, length in enumerate(self.tensor.shape)]
        return self.tensor.new_empty(shape)


@dataclass(frozen=True)
class Kind:
    """One kind of block."""

    name: str
    """Of its function, in the domain ``zimg``."""
    module: nn.Module
    """On the meta device, in the element type it shall compute in."""
    inputs: tuple[Example, ...]
    """Its positional arguments."""
    outputs: int
    """How many results it has."""


class _Functional(nn.Module):
    """Several modules side by side, as one function of their inputs and their parameters."""

    def __init__(self, kinds: Sequence[Kind]) -> None:
        super().__init__()
        # In lists, so that their parameters are not found as attributes of this one.
        self._modules_of = [kind.module for kind in kinds]
        self._names = [list(kind.module.state_dict()) for kind in kinds]

    def forward(self, inputs: list[list[Tensor]], parameters: list[list[Tensor]]) -> Any:
        results = []
        for module, names, own, values in zip(self._modules_of, self._names, inputs, parameters, strict=True):
            result = torch.func.functional_call(module, dict(zip(names, values, strict=True)), tuple(own))
            results.append(result if isinstance(result, tuple) else (result,))
        return results


def trace(kinds: Sequence[Kind]) -> list[ir.Function]:
    """Trace modules into ONNX functions whose inputs are their own, then their parameters by name.

    All go through the exporter together, because most of its time does not depend on what it exports.

    Args:
        kinds: the modules.

    Raises:
        RuntimeError: the exporter fails; a bug in a network, never a user's fault.
    """
    if clashing := [kind.name for kind in kinds if onnx.defs.has(kind.name)]:
        # Parsers that inline functions go by the name alone.
        raise RuntimeError(f"{clashing[0]} is the name of an ONNX operator")
    parameters = [list(kind.module.state_dict().values()) for kind in kinds]
    dynamic = [[dict.fromkeys(e.dynamic, torch.export.Dim.DYNAMIC) for e in kind.inputs] for kind in kinds]
    # The exporter takes dimensions of equal length for one, so those of different modules must not be equal.
    examples = [[e.scaled(factor) for e in kind.inputs] for kind, factor in zip(kinds, FACTORS, strict=False)]
    with TRACING, _quiet(), torch.no_grad():
        program = torch.export.export(
            _Functional(kinds).eval(),
            (examples, parameters),
            dynamic_shapes=(dynamic, [[None] * len(own) for own in parameters]),
        )
        exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    if exported is None:
        raise RuntimeError("the ONNX exporter returned nothing")
    model = exported.model
    for improve in (
        ConstantReshape(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        # Without the exporter's notes on every node a block is a tenth of the size.
        passes.ClearMetadataAndDocStringPass(),
    ):
        improve(model)
    # The graph's inputs are all modules' inputs, then all modules' parameters.
    graph_inputs, graph_outputs = iter(model.graph.inputs), iter(model.graph.outputs)
    own_inputs = [list(islice(graph_inputs, len(kind.inputs))) for kind in kinds]
    functions = []
    for kind, arguments, values in zip(kinds, own_inputs, parameters, strict=True):
        heads = [*arguments, *islice(graph_inputs, len(values))]
        graph = ir.convenience.extract(model.graph, heads, list(islice(graph_outputs, kind.outputs)))
        functions.append(_as_function(kind, graph))
    return functions


def cast_parameters(function: ir.Function, kind: Kind, stored: Sequence[str]) -> None:
    """Let a function take its parameters as they are stored: it casts those that it computes with in another type.

    Args:
        function: of :func:`trace`.
        kind: what it was traced from.
        stored: the element types its parameters have in the weight files, in the order of the ``state_dict``.
    """
    parameters = zip(kind.module.state_dict().items(), stored, strict=True)
    casts = []
    for index, ((name, parameter), dtype) in enumerate(parameters, start=len(kind.inputs)):
        computed = str(parameter.dtype).removeprefix("torch.")
        if computed == dtype or not (value := function.inputs[index]).uses():
            continue
        stored_type = ir.TensorType(ir.DataType(BY_NAME[dtype].onnx))
        function.inputs[index] = taken = ir.Value(name=name, type=stored_type)
        wanted = {"to": ir.DataType(BY_NAME[computed].onnx)}
        _cast_rows(function, value, taken, wanted)
        if not value.uses():
            continue
        cast = ir.node("Cast", [taken], wanted)
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        cast.outputs[0].name = f"{name}_{computed}"
        casts.append(cast)
    if casts:
        function.insert_before(function[0], casts)


def _cast_rows(function: ir.Function, table: ir.Value, taken: ir.Value, wanted: Mapping[str, ir.DataType]) -> None:
    """Cast the rows that are looked up in a table, not all of it: an embedding has one for each word there is."""
    for node, index in list(table.uses()):
        if node.op_type == "Gather" and index == 0:
            rows = node.outputs[0]
            cast = ir.node("Cast", [rows], dict(wanted))
            cast.outputs[0].name = f"{rows.name}_cast"
            take_over(rows, cast.outputs[0])
            rows.type = taken.type
            cast.replace_input_with(0, rows)
            node.replace_input_with(0, taken)
            function.insert_after(node, cast)


def _as_function(kind: Kind, graph: ir.Graph) -> ir.Function:
    names = [*(f"input_{index}" for index in range(len(kind.inputs))), *kind.module.state_dict()]
    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name
    _inline_constants(graph)
    return ir.Function(DOMAIN, kind.name, graph=graph, attributes=[])


def _inline_constants(graph: ir.Graph) -> None:
    """Functions have no initializers: make each of the exporter's small constants a node.

    In an order of our own: theirs is that of a set of objects, and a graph shall have the same bytes every time.
    """
    for value in sorted(graph.initializers.values(), key=lambda value: str(value.name)):
        if value.const_value is None:
            continue
        constant = ir.node("Constant", [], {"value": ir.tensor(value.const_value.numpy(), name=value.name)})
        graph.insert_before(graph[0], constant)
        ir.convenience.replace_all_uses_with(value, constant.outputs[0])
        constant.outputs[0].name = value.name
        del graph.initializers[str(value.name)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notices, which say nothing to a user, off the terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
