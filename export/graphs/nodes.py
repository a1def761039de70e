"""Nodes inserted into a traced block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""


def insert(
    function: ir.Function,
    before: ir.Node,
    operator: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] = {},
    domain: str = "",
) -> ir.Value:
    """Insert a node with one output, and return that."""
    node = ir.node(operator, inputs, dict(attributes), domain=domain)
    function.insert_before(before, node)
    return node.outputs[0]


def constant(function: ir.Function, before: ir.Node, value: Any) -> ir.Value:
    """Insert a constant, an array or a number of numpy, and return its value."""
    return insert(function, before, "Constant", [], {"value": ir.tensor(np.asarray(value))})


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Let a value stand wherever another one of the same shape stood, as a result too."""
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
