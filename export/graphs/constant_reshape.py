"""Give every Reshape a constant target where its dynamic dimensions allow one.

The exporter computes targets at run time (Shape, Squeeze, Concat) even where a length just stays. ONNX writes such a
length as 0 and one unknown length as -1; with these a block loses a dozen nodes, and a compiler sees plain shapes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class ConstantReshape(ir.passes.InPlacePass):
    """Replace computed targets by constants; the shapes the exporter noted say which lengths stay."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the model's graph in place."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "Reshape" and node.domain == "" and (target := _target(node)) is not None:
                constant = ir.node("Constant", [], {"value": ir.tensor(np.array(target, np.int64))})
                model.graph.insert_before(node, constant)
                node.replace_input_with(1, constant.outputs[0])
                node.attributes.pop("allowzero", None)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _target(node: ir.Node) -> list[int] | None:
    """The constant target of a Reshape, or None where more than one length is neither known nor stays."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None:
        return None
    target = []
    for axis, length in enumerate(result.shape):
        if isinstance(length, int):
            target.append(length)
        elif axis < len(source.shape) and source.shape[axis] == length:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None
