"""The linears of an assembled graph: where a block multiplies an input by a weight of the network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir


@dataclass(frozen=True)
class Linear:
    """One matrix multiplication of a function whose right side is one of its parameters."""

    node: ir.Node
    """``MatMul`` or ``Gemm``."""
    weight: ir.Value
    """The function's input, (out, in)."""
    cast: ir.Node | None
    """The cast it goes through, in functions that compute in another element type than it is stored in."""
    first_reader: ir.Value
    """The weight of the first linear of the function that reads the same input."""

    @property
    def input(self) -> ir.Value:
        """What is multiplied."""
        return _present(self.node.inputs[0])

    @property
    def label(self) -> str:
        """What the node is called in its function."""
        return self.node.name or str(self.node.outputs[0].name)


def linears(function: ir.Function) -> list[Linear]:
    """The linears of a traced block, in the order of its nodes.

    The exporter writes them as ``MatMul(x, Transpose(weight))`` or ``Gemm(x, weight, transB=1)``, with a ``Cast`` of
    the weight where the block computes in another element type.
    """
    parameters = set(function.inputs)
    found: list[Linear] = []
    first_readers: dict[ir.Value, ir.Value] = {}
    for node in function:
        if node.domain or node.op_type not in ("MatMul", "Gemm"):
            continue
        right = _present(node.inputs[1])
        if node.op_type == "MatMul":
            transpose = right.producer()
            if transpose is None or transpose.op_type != "Transpose":
                continue
            right = _present(transpose.inputs[0])
        elif [_flag(node, "transA"), _flag(node, "transB")] != [0, 1]:
            continue
        cast = right.producer()
        if cast is not None and cast.op_type == "Cast":
            right = _present(cast.inputs[0])
        if right not in parameters:
            continue
        first_reader = first_readers.setdefault(_present(node.inputs[0]), right)
        found.append(Linear(node, right, cast, first_reader))
    return found


class NamedLinear(NamedTuple):
    """One linear of a network."""

    label: str
    """Operator and node, as the PyTorch fallback calls its step."""
    weight: str
    """The name of its weight, (out, in)."""
    first_reader: str
    """That of the first linear which reads the same input."""
    operator: str
    """``"MatMul"``, which gets the weight transposed, or ``"Gemm"``."""


def named_linears(model: ir.Model) -> Iterator[NamedLinear]:
    """The linears of all calls of a graph's blocks."""
    for node, function, given in calls(model):
        for linear in linears(function):
            label = f"{linear.node.op_type} {f'{node.name}/{linear.label}'!r}"
            weight, first_reader = str(given[linear.weight].name), str(given[linear.first_reader].name)
            yield NamedLinear(label, weight, first_reader, linear.node.op_type)


def calls(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Function, dict[ir.Value, ir.Value]]]:
    """The calls of a graph's blocks: the node, its function, and what each of the function's inputs gets."""
    for node in list(model.graph):
        function = model.functions.get(node.op_identifier())
        if function is not None:
            yield node, function, dict(zip(function.inputs, map(_present, node.inputs), strict=True))


def _flag(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else 0


def _present(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise RuntimeError("a block leaves an input out")
    return value
