"""Products of 4-bit weights that are never widened, against numpy in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from zimgkit.export.quantization.block_products import BlockProducts
from zimgkit.export.quantization.formats import INT4

OUT, WIDTH = 12, 64


def linear(folder: Path, product: str, block: int) -> tuple[ir.Model, Any]:
    """A linear (out, in) of int4 in a block, called twice, its weight in a file; and the weight as it is meant."""
    generator = np.random.default_rng(3)
    scale = generator.uniform(0.01, 0.02, (OUT, WIDTH // block)).astype(np.float32)
    # All sixteen nibbles, the lowest too, which no scheme of ours stores.
    values = generator.permutation(np.resize(np.arange(-8, 8), OUT * WIDTH)).reshape(OUT, WIDTH).astype(np.float32)
    stored = INT4.round(values)
    (folder / "weights.bin").write_bytes(b"\0" * 64 + stored.tobytes())
    weight = ir.ExternalTensor(
        "weights.bin",
        64,
        stored.nbytes,
        ir.DataType.INT4,
        shape=ir.Shape((OUT, WIDTH)),
        name="w",
        base_dir=folder,
    )
    node = helper.make_node
    nodes = [node("DequantizeLinear", ["w", "s"], ["d"], axis=1, block_size=block)]
    if product == "MatMul":
        nodes += [node("Transpose", ["d"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"])]
    else:
        nodes += [node("Gemm", ["x", "d", "b"], ["y"], transB=1)]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("zimg", 1)]
    given = ["x", "w", "s", "b"]
    function = helper.make_function("zimg", "Linear", given, ["y"], nodes, opsets[:1])
    graph = helper.make_graph(
        [node("Linear", given, [name], domain="zimg") for name in ("out", "again")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", WIDTH])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", OUT]) for name in ("out", "again")],
        [
            helper.make_tensor("w", TensorProto.INT4, (OUT, WIDTH), np.zeros(OUT * WIDTH, np.int8)),
            numpy_helper.from_array(scale, "s"),
            numpy_helper.from_array(np.arange(OUT, dtype=np.float32), "b"),
        ],
    )
    made = ir.from_proto(helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=11))
    made.graph.initializers["w"].const_value = weight
    meant = values.astype(np.float64) * np.repeat(scale, block, axis=1)
    return made, (meant, np.arange(OUT) if product == "Gemm" else 0)


@pytest.mark.parametrize("product", ["MatMul", "Gemm"])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("count", [1, 7, 64])
@pytest.mark.parametrize("folded", [True, False])
def test_what_it_gives(folded, count, block, product, tmp_path):
    made, (weight, bias) = linear(tmp_path, product, block)
    assert BlockProducts()(made).modified
    ir.save(made, tmp_path / "net.onnx")
    onnx.checker.check_model(tmp_path / "net.onnx", full_check=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        str(tmp_path / "net.onnx"),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=[] if folded else ["ConstantFolding"],
    )
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node}
    assert "MatMulNBits" in kinds and "DequantizeLinear" not in kinds
    assert ("BitwiseXor" in kinds) is not folded
    x = np.random.default_rng(count).standard_normal((count, WIDTH)).astype(np.float32)
    expected = x.astype(np.float64) @ weight.T + bias
    for found in session.run(None, {"x": x}):
        assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def test_weights_in_8_bits_are_left_as_they_are(tmp_path):
    made, _ = linear(tmp_path, "MatMul", 16)
    (function,) = made.functions.values()
    dequantize = next(node for node in function if node.op_type == "DequantizeLinear")
    del dequantize.attributes["block_size"]
    assert not BlockProducts()(made).modified
