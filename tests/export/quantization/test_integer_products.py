"""Products of integers in place of dequantized weights, against numpy in float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from zimgkit.engines.onnxruntime.engine import EXACT
from zimgkit.export.quantization.integer_products import DYNAMIC, IntegerProducts

OUT, WIDTH = 12, 32
KINDS = {"int8": TensorProto.INT8, "float8": TensorProto.FLOAT8E4M3FN}


def model(kind: str, *, product: str = "MatMul", static: bool = False) -> tuple[ir.Model, Any]:
    """A linear (out, in) in a block, as graphs have them once they are quantized; and its weight as it is meant."""
    generator = np.random.default_rng(3)
    scale = generator.uniform(0.01, 0.02, OUT).astype(np.float32)
    if kind == "int8":
        stored = generator.integers(-127, 128, (OUT, WIDTH), np.int8)
        weight = numpy_helper.from_array(stored, "w")
    else:
        stored = generator.uniform(-400, 400, (OUT, WIDTH)).astype(ml_dtypes.float8_e4m3fn)
        weight = helper.make_tensor("w", KINDS[kind], stored.shape, stored.tobytes(), raw=True)
    node = helper.make_node
    nodes = [node("DequantizeLinear", ["w", "s"], ["d"], axis=0)]
    x = "x"
    if static:
        nodes += [
            node("Constant", [], ["z"], value=helper.make_tensor("z", TensorProto.UINT8, (), [128])),
            node("QuantizeLinear", ["x", "i", "z"], ["q"]),
            node("DequantizeLinear", ["q", "i", "z"], ["r"]),
        ]
        x = "r"
    if product == "MatMul":
        nodes += [node("Transpose", ["d"], ["t"], perm=[1, 0]), node("MatMul", [x, "t"], ["y"])]
    else:
        nodes += [node("Gemm", [x, "d", "b"], ["y"], transB=1)]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("zimg", 1)]
    given = ["x", "w", "s", "b", "i"]
    function = helper.make_function("zimg", "Linear", given, ["y"], nodes, opsets[:1])
    bias = np.arange(OUT, dtype=np.float32)
    graph = helper.make_graph(
        [node("Linear", given, ["out"], domain="zimg")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", WIDTH])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["tokens", OUT])],
        [weight, *(numpy_helper.from_array(v, n) for n, v in (("s", scale), ("b", bias), ("i", np.float32(0.03))))],
    )
    made = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=11)
    meant = stored.astype(np.float64) * scale[:, None]
    return ir.from_proto(made), (meant, bias if product == "Gemm" else 0)


def run(made: ir.Model, x: Any) -> Any:
    proto = ir.to_proto(made)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    for key, value in EXACT.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )
    return session.run(None, {"x": x})[0]


def tokens(count: int, *, outlier: float = 1.0) -> Any:
    x = np.random.default_rng(count).standard_normal((count, WIDTH)).astype(np.float32)
    x[:, 5] *= outlier
    return x


def off(found: Any, x: Any, meant: Any) -> float:
    weight, bias = meant
    expected = x.astype(np.float64) @ weight.T + bias
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("product", ["MatMul", "Gemm"])
@pytest.mark.parametrize("count", [1, 7, 64])
@pytest.mark.parametrize(
    ("kind", "static", "most"),
    # 8 bits of a token's range; 16 bits of it; float32.
    [("int8", True, 0.02), ("int8", False, 1e-4), ("float8", False, 1e-6)],
)
def test_what_it_gives(kind, static, most, count, product):
    made, meant = model(kind, product=product, static=static)
    assert IntegerProducts()(made).modified
    kinds = [node.op_type for function in made.functions.values() for node in function]
    assert kinds.count("QGemm") == (kind == "int8")
    assert "DequantizeLinear" not in kinds
    x = tokens(count)
    assert off(run(made, x), x, meant) < most


@pytest.mark.parametrize("count", [1, 7, 64])
def test_inputs_that_are_rounded_as_they_come_are_as_those_that_the_graph_rounds(count):
    """By the scale of each token in both, whatever the one scale of the graph is."""
    (dynamic, meant), (static, _) = model("int8"), model("int8", static=True)
    dynamic.meta[DYNAMIC] = True
    for made in (dynamic, static):
        IntegerProducts()(made)
    x = tokens(count)
    found = run(dynamic, x)
    np.testing.assert_array_equal(found, run(static, x))
    assert 1e-4 < off(found, x, meant) < 0.02


def test_an_outlier_costs_the_rest_nothing_where_weights_alone_are_quantized():
    made, meant = model("int8")
    IntegerProducts()(made)
    x = tokens(9, outlier=500)
    found, (weight, _) = run(made, x), meant
    expected = x.astype(np.float64) @ weight.T
    rest = x.astype(np.float64)
    rest[:, 5] = 0
    # What the outlier adds is known; the rest must still be there to two digits.
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(rest @ weight.T)


@pytest.mark.parametrize("static", [True, False])
def test_tokens_of_zeros_and_tiny_ones(static):
    made, (weight, _) = model("int8", static=static)
    IntegerProducts()(made)
    x = tokens(4)
    x[1], x[2] = 0, 1e-20 * x[2]
    found = run(made, x)
    assert np.isfinite(found).all() and not found[1].any()
    np.testing.assert_allclose(found[2], x[2].astype(np.float64) @ weight.T, rtol=0.3, atol=1e-20)


def test_inputs_that_several_read_are_rounded_once():
    made, _ = model("int8")
    (function,) = made.functions.values()
    IntegerProducts()(made)
    assert [node.op_type for node in function].count("QuantizeLinear") == 2


def test_blocks_of_4_bits_are_left_as_they_are():
    made, _ = model("int8")
    (function,) = made.functions.values()
    dequantize = next(node for node in function if node.op_type == "DequantizeLinear")
    dequantize.attributes["block_size"] = ir.AttrInt64("block_size", 16)
    assert not IntegerProducts()(made).modified
