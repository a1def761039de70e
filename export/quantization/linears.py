"""Find the linears of an assembled graph: the products of an input and a weight in its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir


@dataclass(frozen=True)
class Linear:
    """One linear of a function: a matrix product whose second operand is one of the function's parameters."""

    node: ir.Node
    """``MatMul`` or ``Gemm``."""
    weight: ir.Value
    """The parameter, (out, in)."""
    cast: ir.Node | None
    """The cast of the weight, in functions that compute in another element type than it is stored in."""
    first_reader: ir.Value
    """The weight of the first linear of the function that reads the same input."""

    @property
    def input(self) -> ir.Value:
        """The first operand, (..., in)."""
        return present(self.node.inputs[0])

    @property
    def label(self) -> str:
        """The name of the node, or of its output."""
        return self.node.name or str(self.node.outputs[0].name)


def linears(function: ir.Function) -> list[Linear]:
    """Find the linears of a traced block, in the order of its nodes.

    The exporter writes them as ``MatMul(x, Transpose(weight))`` or ``Gemm(x, weight, transB=1)``, with a ``Cast`` of
    the weight where the block computes in another element type.
    """
    parameters = set(function.inputs)
    found: list[Linear] = []
    first_readers: dict[ir.Value, ir.Value] = {}
    for node in function:
        if node.domain or node.op_type not in ("MatMul", "Gemm"):
            continue
        right = present(node.inputs[1])
        if node.op_type == "MatMul":
            transpose = right.producer()
            if transpose is None or transpose.op_type != "Transpose":
                continue
            right = present(transpose.inputs[0])
        elif [_flag(node, "transA"), _flag(node, "transB")] != [0, 1]:
            continue
        cast = right.producer()
        if cast is not None and cast.op_type == "Cast":
            right = present(cast.inputs[0])
        if right not in parameters:
            continue
        first_reader = first_readers.setdefault(present(node.inputs[0]), right)
        found.append(Linear(node, right, cast, first_reader))
    return found


class NamedLinear(NamedTuple):
    """One linear of a network, by names."""

    label: str
    """Operator and node, the label of its step in the PyTorch interpreter."""
    weight: str
    """The name of its weight, (out, in)."""
    first_reader: str
    """The name of the weight of the first linear that reads the same input."""
    operator: str
    """``"MatMul"``, whose second operand is the transposed weight, or ``"Gemm"``."""


def named_linears(model: ir.Model) -> Iterator[NamedLinear]:
    """Find the linears in all calls of a graph's blocks."""
    for node, function, given in calls(model):
        for linear in linears(function):
            label = f"{linear.node.op_type} {f'{node.name}/{linear.label}'!r}"
            weight, first_reader = str(given[linear.weight].name), str(given[linear.first_reader].name)
            yield NamedLinear(label, weight, first_reader, linear.node.op_type)


def calls(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Function, dict[ir.Value, ir.Value]]]:
    """The calls of a graph's blocks: the node, its function, and the function's inputs -> the values passed."""
    for node in list(model.graph):
        function = model.functions.get(node.op_identifier())
        if function is not None:
            yield node, function, dict(zip(function.inputs, map(present, node.inputs), strict=True))


def _flag(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else 0


def present(value: ir.Value | None) -> ir.Value:
    """An input of a node, which a block never omits.

    Raises:
        RuntimeError: it does; a bug in a network, never a user's fault.
    """
    if value is None:
        raise RuntimeError("a block leaves an input out")
    return value


def weight_shape(weight: ir.Value) -> tuple[int, int]:
    """(out, in) of an initializer.

    Raises:
        RuntimeError: it has no shape; a bug in a network, never a user's fault.
    """
    if weight.shape is None:
        raise RuntimeError(f"{weight.name} has no shape")
    out, width = weight.shape.numpy()
    return int(out), int(width)
