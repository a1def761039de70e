"""The order in which ONNX Runtime computes what depends on weights alone."""

from __future__ import annotations

import json
from itertools import accumulate

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from zimgkit.engines.bundle import CPU_GRAPH, Bundle
from zimgkit.engines.shapes import output_shape
from zimgkit.export.graphs.weights_first import WeightsFirst

SIZES = {"batch": 1, "image_tokens": 32, "caption_tokens": 32, "text_tokens": 32, "all_tokens": 64}


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_weights_are_widened_when_they_are_needed(family, bundle_of, tmp_path):
    bundle = Bundle.open(bundle_of(family, "bf16"), verify=False)
    denoiser = bundle.component("denoiser")
    assert not onnx.load(bundle.file(denoiser.graphs[CPU_GRAPH]), load_external_data=False).functions
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(
        bundle.file(denoiser.graphs[CPU_GRAPH]), options, disabled_optimizers=["ConstantFolding"]
    )
    shapes = {name: output_shape(spec, SIZES) for name, spec in denoiser.inputs.items()}
    kinds = {name: bool if spec.dtype == "bool" else np.float32 for name, spec in denoiser.inputs.items()}
    session.run(None, {name: np.zeros(shape, kinds[name]) for name, shape in shapes.items()})
    events = json.loads((tmp_path / session.end_profiling()).read_bytes())
    ran = [event["args"] for event in events if event["name"].endswith("_kernel_time")]
    weights = [event for event in ran if event["op_name"] == "Cast" and _is_matrix(event["input_type_shape"][0])]
    assert len(weights) > 8
    products = ("MatMul", "Gemm", "FusedMatMul")
    steps = [int(event in weights) - (event["op_name"] in products) for event in ran]
    # Two products may have the same input.
    assert max(accumulate(steps, lambda open_, step: max(0, open_ + step))) <= 2


def _is_matrix(typed):
    """Of a weight in bfloat16."""
    return len(typed.get("bfloat16", ())) == 2


def test_only_what_depends_on_weights_moves():
    x, w, s = (ir.val(name) for name in "xws")
    nodes = [
        ir.node("Relu", [x]),
        ir.node("Cast", [w], {"to": ir.DataType.FLOAT}),
        ir.node("Constant", [], {"value": ir.tensor(np.float32(2))}),
    ]
    nodes.append(ir.node("Mul", [nodes[1].outputs[0], nodes[2].outputs[0]]))
    nodes.append(ir.node("MatMul", [nodes[0].outputs[0], nodes[3].outputs[0]]))
    nodes.append(ir.node("Mul", [nodes[4].outputs[0], s]))
    function = ir.Function("zimg", "F", graph=ir.Graph([x, w, s], nodes[-1].outputs, nodes=nodes), attributes=[])
    outer, stored = ir.val("outer"), ir.val("stored", const_value=ir.tensor(np.zeros((2, 2), np.float16)))
    call = ir.node("F", [outer, stored, outer], domain="zimg")
    graph = ir.Graph([outer], call.outputs, nodes=[call], initializers=[stored])
    model = ir.Model(graph, ir_version=11, functions=[function])
    assert WeightsFirst()(model).modified
    assert list(function) == [nodes[1], nodes[2], nodes[3], nodes[0], nodes[4], nodes[5]]
    assert not WeightsFirst()(model).modified
