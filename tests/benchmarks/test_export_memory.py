from __future__ import annotations

import os

import export_memory
import onnx
import pytest
from onnx import helper

RESULT = {
    "family": "z-image",
    "precision": "bf16",
    "stored": "bf16",
    "checkpoint_bytes": 20_000_000_000,
    "peak_bytes": 1 << 30,
    "seconds": 60.0,
    "bundle_bytes": 20_000_000_000,
    "linked_bytes": 20_000_000_000,
    "disk_bytes": 0,
    "graphs": {
        "denoiser.onnx": {"bytes": 500_000, "calls": 40, "largest_function": 70},
        "vae_decoder.onnx": {"bytes": 50_000, "calls": 1, "largest_function": 300},
    },
}


def test_within_the_bounds(capsys):
    assert export_memory.report(RESULT) == 0
    assert "1.00 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"peak_bytes": 3 << 30},
        {"graphs": {"denoiser.float32.onnx": {"bytes": 1_000_001, "calls": 1, "largest_function": 1}}},
        {"graphs": {"text_encoder.onnx": {"bytes": 1, "calls": 1, "largest_function": 100}}},
    ],
)
def test_beyond_the_bounds(change, capsys):
    assert export_memory.report(RESULT | change) == 1
    assert "BROKEN" in capsys.readouterr().out


def test_disk_use(tmp_path):
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    checkpoint.mkdir()
    (bundle / "tokenizer").mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"x" * 1_000_000)
    os.link(checkpoint / "weights", bundle / "weights")
    (bundle / "tokenizer" / "own").write_bytes(b"x" * 40_000)
    found = export_memory.disk_use(bundle)
    assert (found["bundle_bytes"], found["linked_bytes"]) == (1_040_000, 1_000_000)
    assert 40_000 <= found["disk_bytes"] < 60_000


def test_graph_size(tmp_path):
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Abs", ["y"], ["z"])]
    opset = [helper.make_opsetid("", 23), helper.make_opsetid("zimg", 1)]
    function = helper.make_function("zimg", "Block", ["x"], ["z"], nodes, opset)
    x, z = (helper.make_tensor_value_info(name, 1, [1]) for name in "xz")
    call = helper.make_node("Block", ["x"], ["z"], domain="zimg")
    model = helper.make_model(helper.make_graph([call], "graph", [x], [z]), functions=[function], opset_imports=opset)
    onnx.save(model, tmp_path / "a.onnx")
    size = (tmp_path / "a.onnx").stat().st_size
    assert export_memory.graph_size(tmp_path / "a.onnx") == {"bytes": size, "calls": 1, "largest_function": 2}


def test_what_only_reads_stored_weights_is_no_node_of_a_block(tmp_path):
    nodes = [
        helper.make_node("Cast", ["weight"], ["a"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Constant", [], ["zeros"], value=helper.make_tensor("", onnx.TensorProto.INT8, [1], [0])),
        helper.make_node("DequantizeLinear", ["quantized", "scale", "zeros"], ["b"]),
        helper.make_node("Cast", ["input_x"], ["x"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Sum", ["a", "b", "x"], ["z"]),
    ]
    inputs, opset = ["input_x", "weight", "quantized", "scale"], [helper.make_opsetid("", 23)]
    function = helper.make_function("zimg", "Block", inputs, ["z"], nodes, opset)
    values = [helper.make_tensor_value_info(name, 1, [1]) for name in ("p", "q", "r", "s", "z")]
    call = helper.make_node("Block", ["p", "q", "r", "s"], ["z"], domain="zimg")
    graph = helper.make_graph([call], "graph", values[:4], values[4:])
    onnx.save(helper.make_model(graph, functions=[function]), tmp_path / "a.onnx")
    assert export_memory.graph_size(tmp_path / "a.onnx")["largest_function"] == 2
