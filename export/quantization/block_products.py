"""Linears of 4-bit weights as ONNX Runtime's CPU kernels take them: they are unpacked on the way.

In a graph with ``DequantizeLinear`` a CPU would widen each weight to float32 in every step. ``MatMulNBits`` takes
weights as they are stored, (out, in), with a scale for each block; but unsigned, about 8. Signed nibbles become that
where their highest bit is turned: ONNX Runtime does so once, when it opens the graph. An input is rounded to 8 bits
with a scale for each block of each token, which is little beside what weights of 4 bits cost.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from zimgkit.export.graphs.nodes import CONTRIB, constant, insert, take_over
from zimgkit.export.quantization.linears import calls, present, weight_shape

BITS = 4
HIGHEST = 0x88
"""The highest bits of both nibbles of a byte."""
IN_8_BITS = 4
"""The kernel's accuracy level at which inputs are rounded so."""


class BlockProducts(ir.passes.InPlacePass):
    """Rewrite the products of a graph that computes in float32 with weights of int4 that have scales for blocks."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the model's functions in place, and the types of the weights that they take."""
        given = {function: values for _, function, values in calls(model)}
        products = [(f, node, deq) for f in given for node, deq in _products(f)]
        sizes: dict[tuple[ir.Function, ir.Value], int] = {}
        for function, node, dequantize in products:
            weight = present(dequantize.inputs[0])
            sizes[function, weight] = dequantize.attributes["block_size"].as_int()
            _rewrite(function, node, dequantize, weight_shape(given[function][weight]))
        for _, function, values in calls(model):
            for weight, value in values.items():
                if (function, weight) in sizes:
                    _retype(value, sizes[function, weight])
        if products:
            model.opset_imports[CONTRIB] = 1
            passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=bool(products))


def _products(function: ir.Function) -> Iterator[tuple[ir.Node, ir.Node]]:
    """The products with a weight that is dequantized by blocks, and the nodes that do that."""
    for node in list(function):
        if node.domain or node.op_type not in ("MatMul", "Gemm"):
            continue
        producer = present(node.inputs[1]).producer()
        if producer is not None and producer.op_type == "Transpose":
            producer = present(producer.inputs[0]).producer()
        if producer is not None and producer.op_type == "DequantizeLinear" and "block_size" in producer.attributes:
            yield node, producer


def _rewrite(function: ir.Function, node: ir.Node, dequantize: ir.Node, shape: tuple[int, int]) -> None:
    weight, scale = present(dequantize.inputs[0]), present(dequantize.inputs[1])
    unsigned = insert(function, node, "BitwiseXor", [weight, constant(function, node, np.uint8(HIGHEST))])
    attributes = {
        "N": shape[0],
        "K": shape[1],
        "bits": BITS,
        "block_size": dequantize.attributes["block_size"].as_int(),
        "accuracy_level": IN_8_BITS,
    }
    out = insert(function, node, "MatMulNBits", [present(node.inputs[0]), unsigned, scale], attributes, CONTRIB)
    if node.op_type == "Gemm" and len(node.inputs) > 2:
        out = insert(function, node, "Add", [out, present(node.inputs[2])])
    take_over(node.outputs[0], out)
    function.opset_imports[CONTRIB] = 1
    weight.shape, weight.type = None, ir.TensorType(ir.DataType.UINT8)


def _retype(value: ir.Value, size: int) -> None:
    """See a stored weight (out, in) of int4 as the bytes of its blocks, (out, blocks, bytes)."""
    data = value.const_value
    if not isinstance(data, ir.ExternalTensor) or data.dtype != ir.DataType.INT4:
        return  # Another block has the same weight.
    rows, width = weight_shape(value)
    shape = ir.Shape((rows, width // size, size * BITS // 8))
    value.const_value = ir.ExternalTensor(
        data.location,
        data.offset,
        data.length,
        ir.DataType.UINT8,
        shape=shape,
        name=str(data.name),
        base_dir=Path(data.base_dir),
    )
    value.shape, value.type = shape, ir.TensorType(ir.DataType.UINT8)
