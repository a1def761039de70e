"""One block, its parameters as inputs, to an ONNX function.

A network here is a few kinds of block repeated dozens of times. Each kind is traced once, on the meta device, so no
weight exists in memory, none is folded, renamed or merged, and tracing takes as long for 2 layers as for 60.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn

from zimg.export.passes.constant_reshape import ConstantReshape

OPSET = 23
"""The first with ``RMSNormalization``, ``RotaryEmbedding`` and ``Attention``; 24 loses the first in the exporter."""
DOMAIN = "zimg"


@dataclass(frozen=True)
class Example:
    """One tensor input of a block: its example on the meta device, and which sides are free."""

    tensor: Tensor
    free: tuple[int, ...]


class _Functional(nn.Module):
    """A module as a function of its inputs and its parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = [module]  # In a list, so that its parameters are not found as attributes of this one.
        self._dtypes = {name: parameter.dtype for name, parameter in module.state_dict().items()}

    def forward(self, inputs: list[Tensor], parameters: list[Tensor]) -> Any:
        pairs = zip(self._dtypes.items(), parameters, strict=True)
        cast = {name: parameter.to(dtype) for (name, dtype), parameter in pairs}
        return torch.func.functional_call(self._module[0], cast, tuple(inputs))


def trace(name: str, module: nn.Module, inputs: Sequence[Example], *, stored: Sequence[str]) -> ir.Function:
    """Trace a module into an ONNX function whose inputs are its own, then its parameters by name.

    Args:
        name: the function's name, in the domain ``zimg``.
        module: on the meta device, in the element type it shall compute in.
        inputs: its positional arguments.
        stored: the names of the element types its parameters have in the weight files, in the order of its
            ``state_dict``; parameters of another type than the module's are cast in the function.

    Raises:
        RuntimeError: the exporter fails; a bug in a network, never a user's fault.
    """
    state = module.state_dict()
    parameters = [p.to(getattr(torch, dtype)) for p, dtype in zip(state.values(), stored, strict=True)]
    dynamic = [dict.fromkeys(example.free, torch.export.Dim.DYNAMIC) for example in inputs]
    wrapped = _Functional(module).eval()
    with _quiet(), torch.no_grad():
        program = torch.export.export(
            wrapped,
            ([example.tensor for example in inputs], parameters),
            dynamic_shapes=(dynamic, [None] * len(parameters)),
        )
        exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    if exported is None:
        raise RuntimeError(f"the ONNX exporter returned nothing for {name}")
    model = exported.model
    for improve in (
        ConstantReshape(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        # Without the exporter's notes on every node a block is a tenth of the size.
        passes.ClearMetadataAndDocStringPass(),
    ):
        improve(model)
    return _as_function(name, model.graph, list(state), len(inputs))


def _as_function(name: str, graph: ir.Graph, parameters: Sequence[str], arguments: int) -> ir.Function:
    names = [f"input_{index}" for index in range(arguments)] + list(parameters)
    for value, new_name in zip(graph.inputs, names, strict=True):
        value.name = new_name
    _inline_constants(graph)
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])


def _inline_constants(graph: ir.Graph) -> None:
    """Functions have no initializers: make each of the exporter's small constants a node."""
    for value in list(graph.initializers.values()):
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
