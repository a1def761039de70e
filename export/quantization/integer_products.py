"""Quantized linears as ONNX Runtime's CPU kernels take them: weights stay in 8 bits.

In a graph with ``DequantizeLinear`` a CPU would hold each weight in float32, whole and turned over, before it computes.
Here a linear of int8 weights is a product of integers: each token of the input is rounded to 8 bits with a scale of its
own when it comes (LLM.int8(), https://arxiv.org/abs/2208.07339, without its outliers in float). That needs no
calibration, and is closer than the one scale that compilers want. Where weights alone are to be quantized, what was
rounded off is rounded as well: an input then keeps 16 bits, and no outlier costs the others anything. Weights in
float8, for which CPUs have no product, are widened when they are needed, and their scales applied to what comes out.

Of the products of integers ``QGemm`` alone takes weights as they are stored, (out, in), and scales them on its way.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QGemm
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from zimgkit.export.graphs.nodes import CONTRIB, constant, insert, take_over
from zimgkit.export.quantization.linears import calls, present, weight_shape

LARGEST = 127
"""Of the integers that a token is rounded to."""
FINE = 2 * LARGEST
"""Into how many parts one of these is divided, where what was rounded off is rounded too."""
DYNAMIC = "zimgkit.dynamic"
"""In a model's ``meta``: whether inputs keep 8 bits although nothing rounds them in the graph."""
ZERO_POINT = 128
"""They are stored unsigned: the kernels multiply unsigned inputs and signed weights."""


class IntegerProducts(ir.passes.InPlacePass):
    """Rewrite the products of a graph that computes in float32 with weights of int8 or float8."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the model's functions in place."""
        changed = False
        # All calls of a function give it weights of the same element types.
        given = {function: values for _, function, values in calls(model)}
        for function, values in given.items():
            changed |= _rewrite(function, values, is_dynamic=bool(model.meta.get(DYNAMIC)))
        if changed:
            model.opset_imports[CONTRIB] = 1
            passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=changed)


def _rewrite(function: ir.Function, given: Mapping[ir.Value, ir.Value], *, is_dynamic: bool) -> bool:
    products = [(node, dequantize) for node in function if (dequantize := _dequantized_weight(node)) is not None]
    tokens: dict[tuple[ir.Value, bool], _Tokens] = {}
    for node, dequantize in products:
        weight, scale = present(dequantize.inputs[0]), present(dequantize.inputs[1])
        left = present(node.inputs[0])
        if given[weight].dtype == ir.DataType.INT8:
            source = _unrounded(left)
            key = (source, source is left and not is_dynamic)
            rows, width = weight_shape(given[weight])
            if key not in tokens:
                tokens[key] = _round_tokens(function, node, source, twice=key[1], width=width)
            out = _integer_product(function, node, tokens[key], weight, scale, rows)
        else:
            wide = insert(function, node, "Cast", [weight], {"to": ir.DataType.FLOAT})
            turned = insert(function, node, "Transpose", [wide], {"perm": [1, 0]})
            out = insert(function, node, "MatMul", [left, turned])
            out = insert(function, node, "Mul", [out, scale])
        if node.op_type == "Gemm" and len(node.inputs) > 2:
            out = insert(function, node, "Add", [out, present(node.inputs[2])])
        old = node.outputs[0]
        take_over(old, out)
    if products:
        function.opset_imports[CONTRIB] = 1
    return bool(products)


def _dequantized_weight(node: ir.Node) -> ir.Node | None:
    """Of a product with a weight of 8 bits: the node that dequantizes it by its rows."""
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return None
    producer = present(node.inputs[1]).producer()
    if node.op_type == "MatMul":
        if producer is None or producer.op_type != "Transpose":
            return None
        producer = present(producer.inputs[0]).producer()
    if producer is None or producer.op_type != "DequantizeLinear" or "block_size" in producer.attributes:
        return None
    return producer if present(producer.inputs[0]).producer() is None else None


def _unrounded(value: ir.Value) -> ir.Value:
    """An input as it is before it is rounded with one scale."""
    dequantize = value.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return value
    quantize = present(dequantize.inputs[0]).producer()
    return value if quantize is None else present(quantize.inputs[0])


@dataclass(frozen=True)
class _Tokens:
    """An input as ``steps @ integers``, integers about :data:`ZERO_POINT`, in one part or two."""

    integers: ir.Value
    """(tokens * parts, in) uint8."""
    steps: ir.Value
    """(tokens, 1) float32, or (tokens, 1, 2)."""
    parts: int
    shape: ir.Value
    """Of the input, with -1 in place of its last dimension."""


def _round_tokens(function: ir.Function, node: ir.Node, value: ir.Value, *, twice: bool, width: int) -> _Tokens:
    """Round (..., in) float32 by the largest number of each token, and what is left once more."""

    def add(operator: str, *inputs: Any, **attributes: Any) -> ir.Value:
        values = [each if isinstance(each, ir.Value) else constant(function, node, each) for each in inputs]
        return insert(function, node, operator, values, attributes)

    def quantize(values: ir.Value, steps: ir.Value) -> ir.Value:
        of_rows = add("Reshape", steps, np.array([-1]))
        zeros = add("Expand", np.uint8(ZERO_POINT), add("Shape", of_rows))
        return add("QuantizeLinear", values, of_rows, zeros, axis=0)

    shape = add("Concat", add("Shape", value, end=-1), np.array([-1]), axis=0)
    rows, last = add("Flatten", value, axis=-1), np.array([-1])
    size = add("Max", add("ReduceMax", rows, last), add("Neg", add("ReduceMin", rows, last)))
    # A token of zeros stays one.
    step = add("Max", add("Mul", size, np.float32(1 / LARGEST)), np.float32(1e-30))
    high = quantize(rows, step)
    if not twice:
        return _Tokens(high, step, 1, shape)
    # By hand: ONNX Runtime would take DequantizeLinear for the beginning of a quantized product.
    rounded = add("Sub", add("Cast", high, to=ir.DataType.FLOAT), np.float32(ZERO_POINT))
    left = add("Sub", rows, add("Mul", rounded, step))
    low = quantize(left, add("Mul", step, np.float32(1 / FINE)))
    # Both in one product, for which the kernel's copy of the weight is there once; the rows of a token side by side.
    integers = add("Reshape", add("Concat", high, low, axis=1), np.array([-1, width]))
    steps = add("Unsqueeze", add("Mul", step, np.array([[1, 1 / FINE]], np.float32)), np.array([1]))
    return _Tokens(integers, steps, 2, shape)


def _integer_product(
    function: ir.Function, node: ir.Node, tokens: _Tokens, weight: ir.Value, scale: ir.Value, rows: int
) -> ir.Value:
    """The product with a weight (out, in) of int8, (..., out) float32."""
    one, zero = constant(function, node, np.float32(1)), constant(function, node, np.uint8(ZERO_POINT))
    none = constant(function, node, np.zeros(rows, np.int8))
    inputs = [tokens.integers, one, zero, weight, scale, none]
    out = insert(function, node, "QGemm", inputs, {"transB": 1}, CONTRIB)
    if tokens.parts == 1:
        out = insert(function, node, "Mul", [out, tokens.steps])
    else:
        out = insert(function, node, "Reshape", [out, constant(function, node, np.array([-1, tokens.parts, rows]))])
        out = insert(function, node, "MatMul", [tokens.steps, out])
    return insert(function, node, "Reshape", [out, tokens.shape])
