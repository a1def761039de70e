"""Every operator of the table against ONNX Runtime."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn.attention import SDPBackend, sdpa_kernel

from zimgkit.engines.errors import BackendError
from zimgkit.engines.torch import layers
from zimgkit.engines.torch.graph import compile_graph, read_constant, run
from zimgkit.engines.torch.ops import HOST_INPUTS, ONLY, OPS

RNG = np.random.default_rng(0)
INT8, UINT8, FLOAT8 = TensorProto.INT8, TensorProto.UINT8, TensorProto.FLOAT8E4M3FN


def f(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def pos(*shape: int) -> np.ndarray:
    return np.abs(f(*shape)) + np.float32(0.1)


def i(*values: Any) -> np.ndarray:
    return np.array(values, np.int64)


def n(value: int) -> np.ndarray:
    return np.array(value, np.int64)


def b(*shape: int) -> np.ndarray:
    return RNG.random(shape) > 0.5


def ints(low: int, high: int, *shape: int) -> np.ndarray:
    return RNG.integers(low, high, shape)


def model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, np.ndarray],
    outputs: int = 1,
    constants: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """A model of some nodes with dynamic dimensions everywhere, whose outputs are y0, y1 …"""
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    starts = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), [f"{name}{d}" for d in range(array.ndim)]
        )
        for name, array in inputs.items()
    ]
    ends = [onnx.ValueInfoProto(name=f"y{k}") for k in range(outputs)]
    graph = helper.make_graph(nodes, "g", starts, ends, stored)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return onnx.shape_inference.infer_shapes(proto)


def interpret(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    read = partial(read_constant, None, "")
    program = compile_graph(ir.from_proto(proto), read, torch.device("cpu"))
    with torch.inference_mode():
        found = run(program, {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()})
    return [tensor.numpy() for tensor in found.values()]


def reference(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def compare(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], tolerance: float = 2e-6) -> None:
    expected, found = reference(proto, feeds), interpret(proto, feeds)
    assert len(found) == len(expected)
    for theirs, ours in zip(expected, found, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


Case = tuple[str, list[Any], dict[str, Any]]

UNARY: list[Case] = [
    *[(op, [f(3, 5)], {}) for op in ("Abs", "Neg", "Exp", "Cos", "Sin", "Tanh", "Sigmoid", "Erf", "Relu", "Floor")],
    *[(op, [f(3, 5)], {}) for op in ("Ceil", "Identity", "Softmax", "Gelu")],
    *[(op, [pos(3, 5)], {}) for op in ("Sqrt", "Log", "Reciprocal")],
    ("Round", [np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2.4], np.float32)], {}),
    ("Neg", [i(3, -4)], {}),
    ("Gelu", [f(4, 7)], {"approximate": "tanh"}),
    ("Softmax", [f(2, 3, 4)], {"axis": 1}),
    ("Softmax", [f(2, 3, 4)], {"axis": -3}),
    ("Not", [b(7)], {}),
    ("Sigmoid", [f()], {}),
]

BINARY: list[Case] = [
    *[(op, [f(2, 3, 4), f(3, 1)], {}) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")],
    *[(op, [i(7, -7, 6, 0), i(2, 2, -4, 3)], {}) for op in ("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min")],
    *[
        (op, [ints(0, 3, 4, 5), ints(0, 3, 5)], {})
        for op in ("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual")
    ],
    *[(op, [f(4, 5), f(5)], {}) for op in ("Less", "Greater")],
    *[(op, [b(4, 1), b(1, 5)], {}) for op in ("And", "Or", "Equal")],
    ("Mod", [f(9), pos(9)], {"fmod": 1}),
    ("Pow", [pos(3, 4), f(4)], {}),
    ("Pow", [f(3, 4), np.array(2, np.float32)], {}),
    ("Pow", [f(3, 4), n(3)], {}),
    ("Pow", [i(2, 3), np.array(2, np.float32)], {}),
    ("Max", [f(3), f(3), f(1)], {}),
    ("Min", [f(3)], {}),
    ("Where", [b(3, 1), f(3, 4), f()], {}),
    ("Where", [b(2), i(1, 2), i(3, 4)], {}),
    ("Clip", [f(9), np.array(-0.5, np.float32), np.array(0.5, np.float32)], {}),
    ("Clip", [f(9), None, np.array(0.5, np.float32)], {}),
    ("Clip", [f(9), np.array(0, np.float32)], {}),
    ("Clip", [f(9)], {}),
    ("Clip", [i(1, 5, 9), n(2), n(6)], {}),
]

PRODUCTS: list[Case] = [
    ("MatMul", [f(4, 5), f(5, 6)], {}),
    ("MatMul", [f(2, 3, 4, 5), f(5, 6)], {}),
    ("MatMul", [f(2, 1, 4, 5), f(3, 5, 6)], {}),
    ("MatMul", [f(5), f(5, 6)], {}),
    ("MatMul", [f(4, 5), f(5)], {}),
    ("Gemm", [f(4, 5), f(5, 6)], {}),
    ("Gemm", [f(4, 5), f(6, 5), f(6)], {"transB": 1}),
    ("Gemm", [f(5, 4), f(5, 6), f(4, 1)], {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", [f(4, 5), f(5, 6), f()], {"beta": 0.25}),
    ("Conv", [f(2, 3, 9), f(4, 3, 3), f(4)], {"pads": [1, 1]}),
    ("Conv", [f(2, 3, 9, 8), f(4, 3, 3, 3)], {}),
    ("Conv", [f(1, 4, 9, 8), f(6, 2, 3, 2), f(6)], {"group": 2, "strides": [2, 1], "pads": [1, 0, 1, 0]}),
    ("Conv", [f(1, 4, 9, 8), f(4, 1, 3, 3), f(4)], {"group": 4, "dilations": [2, 1], "kernel_shape": [3, 3]}),
    ("Conv", [f(1, 3, 8, 8), f(4, 3, 3, 3), f(4)], {"pads": [0, 0, 1, 1], "strides": [2, 2], "auto_pad": "NOTSET"}),
    ("Conv", [f(1, 3, 8, 8), f(4, 3, 3, 3), f(4)], {"pads": [0, 1, 2, 3]}),
    ("Conv", [f(1, 3, 5, 6, 7), f(4, 3, 3, 3, 3), f(4)], {"pads": [2, 1, 1, 0, 1, 1], "auto_pad": "NOTSET"}),
    ("Conv", [f(1, 3, 8, 8), f(4, 3, 1, 1), f(4)], {"auto_pad": "VALID"}),
]

NORMS: list[Case] = [
    ("InstanceNormalization", [f(2, 3, 4, 5), f(3), f(3)], {}),
    ("InstanceNormalization", [f(2, 3, 40), f(3), f(3)], {"epsilon": 1e-2}),
    ("GroupNormalization", [f(2, 6, 4, 5), f(6), f(6)], {"num_groups": 3}),
    ("GroupNormalization", [f(1, 6, 4), f(6), f(6)], {"num_groups": 2, "epsilon": 1e-2, "stash_type": 1}),
    ("LayerNormalization", [f(2, 3, 8), f(8), f(8)], {}),
    ("LayerNormalization", [f(2, 3, 8), f(8)], {"axis": 2, "epsilon": 1e-6, "stash_type": 1}),
    ("LayerNormalization", [f(2, 3, 8), f(3, 8), f(3, 8)], {"axis": 1}),
    ("RMSNormalization", [f(2, 3, 8), f(8)], {}),
    ("RMSNormalization", [f(2, 3, 8), f(3, 8)], {"axis": -2, "epsilon": 1e-2}),
    ("RMSNormalization", [f(2, 3, 4, 8), f(8)], {"epsilon": 1e-6, "stash_type": 1}),
]


def angles(*shape: int) -> list[np.ndarray]:
    angle = f(*shape)
    return [np.cos(angle), np.sin(angle)]


ROTARY: list[Case] = [
    ("RotaryEmbedding", [f(2, 3, 5, 8), *angles(2, 5, 4)], {}),
    ("RotaryEmbedding", [f(2, 3, 5, 8), *angles(2, 5, 4)], {"interleaved": 1}),
    ("RotaryEmbedding", [f(2, 5, 24), *angles(2, 5, 4)], {"num_heads": 3}),
    ("RotaryEmbedding", [f(2, 5, 24), *angles(2, 5, 4)], {"num_heads": 3, "interleaved": 1}),
    ("RotaryEmbedding", [f(2, 3, 5, 8), *angles(9, 4), ints(0, 9, 2, 5)], {}),
    ("RotaryEmbedding", [f(2, 5, 24), *angles(9, 4), ints(0, 9, 2, 5)], {"num_heads": 3, "interleaved": 1}),
    ("RotaryEmbedding", [f(2, 5, 30), *angles(9, 2), ints(0, 9, 2, 5)], {"num_heads": 3, "rotary_embedding_dim": 4}),
    (
        "RotaryEmbedding",
        [f(2, 3, 5, 10), *angles(2, 5, 3)],
        {"num_heads": 3, "rotary_embedding_dim": 6, "interleaved": 1},
    ),
]

FLAT = {"q_num_heads": 4, "kv_num_heads": 4}
ATTENTION: list[Case] = [
    ("Attention", [f(2, 4, 5, 8), f(2, 4, 7, 8), f(2, 4, 7, 8)], {}),
    ("Attention", [f(2, 4, 5, 8), f(2, 4, 7, 8), f(2, 4, 7, 6)], {"scale": 0.2, "softmax_precision": 1}),
    ("Attention", [f(2, 4, 6, 8), f(2, 4, 6, 8), f(2, 4, 6, 8)], {"is_causal": 1, "softcap": 0.0}),
    ("Attention", [f(1, 4, 5, 8), f(1, 2, 7, 8), f(1, 2, 7, 8)], {}),
    ("Attention", [f(1, 4, 6, 8), f(1, 1, 6, 8), f(1, 1, 6, 8)], {"is_causal": 1}),
    ("Attention", [f(2, 5, 32), f(2, 7, 32), f(2, 7, 32)], FLAT),
    ("Attention", [f(2, 5, 32), f(2, 7, 16), f(2, 7, 24)], {"q_num_heads": 4, "kv_num_heads": 2, "scale": 1.0}),
    ("Attention", [f(2, 5, 32), f(2, 5, 32), f(2, 5, 32)], {**FLAT, "is_causal": 1}),
    ("Attention", [f(2, 4, 5, 8), f(2, 4, 7, 8), f(2, 4, 7, 8), f(5, 7)], {}),
    ("Attention", [f(2, 4, 5, 8), f(2, 4, 7, 8), f(2, 4, 7, 8), f(2, 1, 5, 7)], {}),
    ("Attention", [f(2, 4, 3, 8), f(2, 4, 4, 8), f(2, 4, 4, 8), b(2, 1, 3, 4) | (np.arange(4) == 2)], {}),
    ("Attention", [f(2, 5, 32), f(2, 7, 32), f(2, 7, 32), np.tri(5, 7, 2) > 0], FLAT),
    ("Attention", [f(1, 4, 6, 8), f(1, 4, 6, 8), f(1, 4, 6, 8), f(6, 6)], {"is_causal": 1}),
    ("Attention", [f(1, 4, 6, 8), f(1, 4, 6, 8), f(1, 4, 6, 8), np.eye(6) < 0.5], {"is_causal": 0}),
]

SHAPES: list[Case] = [
    ("Reshape", [f(2, 3, 4), i(4, 6)], {}),
    ("Reshape", [f(2, 3, 4), i(0, -1)], {}),
    ("Reshape", [f(2, 3, 4), i(0, 0, 2, -1)], {}),
    ("Reshape", [f(0, 3), i(3, 0)], {"allowzero": 1}),
    ("Reshape", [f(1, 1), np.array([], np.int64)], {}),
    ("Transpose", [f(2, 3, 4)], {}),
    ("Transpose", [f(2, 3, 4)], {"perm": [1, 2, 0]}),
    ("Unsqueeze", [f(3, 4), i(0)], {}),
    ("Unsqueeze", [f(3, 4), i(-1, 1)], {}),
    ("Squeeze", [f(1, 3, 1, 4), i(0)], {}),
    ("Squeeze", [f(1, 3, 1, 4), i(-2, 0)], {}),
    ("Squeeze", [f(1, 3, 1, 4)], {}),
    ("Concat", [f(2, 3), f(2, 1), f(2, 4)], {"axis": 1}),
    ("Concat", [f(2, 3), f(1, 3)], {"axis": -2}),
    ("Concat", [i(1), i(2, 3)], {"axis": 0}),
    ("Slice", [f(8, 9), i(1), i(5)], {}),
    ("Slice", [f(8, 9), i(1, -4), i(5, 1000), i(1, 0)], {}),
    ("Slice", [f(8, 9), i(-1, 0), i(np.iinfo(np.int64).min, 8), i(0, 1), i(-1, 3)], {}),
    ("Slice", [f(8, 9), i(6), i(2), i(-1)], {}),
    ("Slice", [f(8, 9), i(-100), i(np.iinfo(np.int64).max), i(1), i(2)], {}),
    ("Slice", [i(4, 5, 6), i(1), i(2)], {}),
    ("Gather", [f(8, 9), i(1, 3, 3)], {}),
    ("Gather", [f(8, 9), ints(0, 9, 2, 3)], {"axis": 1}),
    ("Gather", [f(8, 9), n(-1)], {"axis": -1}),
    ("Gather", [f(8, 9), i(-8, 7)], {}),
    ("Gather", [i(4, 5, 6), n(2)], {}),
    ("GatherElements", [f(4, 5), ints(-5, 5, 4, 3)], {"axis": 1}),
    ("GatherElements", [f(4, 5), ints(0, 4, 2, 5)], {}),
    ("GatherND", [f(4, 5, 6), ints(0, 4, 2, 3, 2)], {}),
    ("GatherND", [f(4, 5), ints(-4, 4, 3, 1)], {}),
    ("Expand", [f(3, 1), i(2, 1, 4)], {}),
    ("Expand", [f(3, 4), i(1)], {}),
    ("Expand", [f(), i(2, 3)], {}),
    ("Expand", [f(2, 3), i(1, 1)], {}),
    ("Tile", [f(2, 3), i(2, 1)], {}),
    ("Tile", [f(2, 3), i(3, 2)], {}),
    ("Pad", [f(2, 3), i(0, 1, 2, 3)], {}),
    ("Pad", [f(2, 3), i(1, 2, 0, 0), np.array(7, np.float32)], {"mode": "constant"}),
    ("Pad", [f(2, 3, 4), i(1, 2, 0, 1), np.array(-1, np.float32), i(-1, 0)], {}),
    ("Pad", [f(4, 6), i(-1, 0, 2, -3)], {}),
    ("Pad", [i(1, 2), i(1, 1), n(9)], {}),
    ("Shape", [f(2, 3, 4)], {}),
    ("Shape", [f(2, 3, 4)], {"start": 1}),
    ("Shape", [f(2, 3, 4)], {"start": -2, "end": -1}),
    ("Shape", [f(2, 3, 4)], {"start": 0, "end": 9}),
    ("Size", [f(2, 3, 4)], {}),
    ("Range", [n(2), n(11), n(3)], {}),
    ("Range", [n(5), n(0), n(-2)], {}),
    ("Range", [np.array(0, np.float32), np.array(1, np.float32), np.array(0.25, np.float32)], {}),
    ("ConstantOfShape", [i(2, 3)], {}),
    ("ConstantOfShape", [np.array([], np.int64)], {"value": helper.make_tensor("v", TensorProto.INT64, [1], [5])}),
    ("ConstantOfShape", [i(4)], {"value": helper.make_tensor("v", TensorProto.BOOL, [1], [True])}),
    ("Trilu", [f(4, 5)], {}),
    ("Trilu", [f(2, 4, 5), n(1)], {"upper": 0}),
    ("CumSum", [f(3, 4), n(1)], {}),
    ("CumSum", [ints(0, 5, 3, 4), np.array(-2, np.int32)], {}),
]

REDUCTIONS: list[Case] = [
    (f"Reduce{kind}", [f(2, 3, 4), *axes], attributes)
    for kind in ("Mean", "Sum", "Max", "Min", "L2", "SumSquare")
    for axes, attributes in (
        ([], {}),
        ([i(-1)], {}),
        ([i(0, 2)], {"keepdims": 0}),
        ([i(1)], {"noop_with_empty_axes": 0, "keepdims": 1}),
        ([], {"keepdims": 0}),
    )
] + [("ReduceSum", [ints(0, 9, 3, 4), i(0)], {}), ("ReduceMax", [ints(0, 9, 3, 4), i(1)], {"keepdims": 0})]

NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
RESIZES: list[Case] = [
    ("Resize", [f(2, 3, 4, 5), None, np.array([1, 1, 2, 2], np.float32)], NEAREST),
    ("Resize", [f(2, 3, 4, 5), None, np.array([1, 1, 3, 1.5], np.float32)], NEAREST),
    ("Resize", [f(2, 3, 4, 5), None, None, i(2, 3, 8, 15)], NEAREST),
    ("Resize", [f(2, 3, 6), None, np.array([1, 1, 0.5], np.float32)], {**NEAREST, "antialias": 0}),
]

CASTS: list[Case] = [
    ("Cast", [f(3, 4) * 5], {"to": TensorProto.INT64}),
    ("Cast", [i(0, 1, 2)], {"to": TensorProto.BOOL}),
    ("Cast", [b(5)], {"to": TensorProto.FLOAT}),
    ("Cast", [f(3)], {"to": TensorProto.FLOAT16}),
    ("CastLike", [i(0, 1, 2), f(1)], {}),
]

CASES = UNARY + BINARY + PRODUCTS + NORMS + ROTARY + ATTENTION + SHAPES + REDUCTIONS + RESIZES + CASTS


def name(case: Case) -> str:
    return f"{case[0]}-{'-'.join('x'.join(map(str, a.shape)) if a is not None else '_' for a in case[1])}-{case[2]}"


@pytest.mark.parametrize("stored", [False, True], ids=["inputs", "constants"])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_like_onnx_runtime(case: Case, stored: bool) -> None:
    """With everything an input, and with everything but the first a constant of the graph."""
    operator, arrays, attributes = case
    given = {f"x{k}": array for k, array in enumerate(arrays) if array is not None}
    names = [f"x{k}" if array is not None else "" for k, array in enumerate(arrays)]
    node = helper.make_node(operator, names, ["y0"], **attributes)
    # ONNX Runtime does not open a Resize whose sizes it cannot see.
    feeds = {"x0": given["x0"]} if stored or operator == "Resize" else given
    constants = {name: array for name, array in given.items() if name not in feeds}
    compare(model([node], feeds, constants=constants), feeds)


@pytest.mark.parametrize(
    ("arrays", "attributes", "outputs"),
    [
        ([f(6, 4)], {"num_outputs": 3}, 3),
        ([f(7, 4)], {"num_outputs": 3}, 3),
        ([f(2, 7), i(3, 0, 4)], {"axis": -1}, 3),
        ([f(2, 7), i(7)], {"axis": 1}, 1),
    ],
)
def test_split(arrays: list[np.ndarray], attributes: dict[str, Any], outputs: int) -> None:
    feeds = {f"x{k}": array for k, array in enumerate(arrays)}
    node = helper.make_node("Split", list(feeds), [f"y{k}" for k in range(outputs)], **attributes)
    compare(model([node], feeds, outputs), feeds)


@pytest.mark.parametrize(
    "attributes",
    [
        {"value": helper.make_tensor("v", TensorProto.FLOAT, [2], [1.5, 2])},
        {"value": helper.make_tensor("v", TensorProto.INT32, [], [3])},
        {"value_float": 0.1},
        {"value_floats": [1.0, 2.0]},
        {"value_int": 7},
        {"value_ints": [1, 2]},
    ],
    ids=str,
)
def test_constant(attributes: dict[str, Any]) -> None:
    nodes = [helper.make_node("Constant", [], ["c"], **attributes), helper.make_node("Add", ["c", "c"], ["y0"])]
    compare(model(nodes, {}), {})


def quantized(x: np.ndarray, scale: np.ndarray, zero: onnx.TensorProto | None, **attributes: Any) -> onnx.ModelProto:
    """x -> QuantizeLinear -> DequantizeLinear, and what lies between as float."""
    nodes = [helper.make_node("Constant", [], ["zero"], value=zero)] if zero is not None else []
    zeros = ["zero"] if zero is not None else []
    spread = {key: value for key, value in attributes.items() if key in ("axis", "block_size")}
    nodes += [
        helper.make_node("QuantizeLinear", ["x", "scale", *zeros], ["q"], **attributes),
        helper.make_node("Cast", ["q"], ["y0"], to=TensorProto.FLOAT),
        helper.make_node("DequantizeLinear", ["q", "scale", *zeros], ["y1"], **spread),
    ]
    return model(nodes, {"x": x, "scale": scale}, 2)


@pytest.mark.parametrize(
    ("x", "scale", "zero", "attributes"),
    [
        (f(4, 6) * 9, np.array(0.05, np.float32), None, {}),
        (f(4, 6) * 9, np.array(0.05, np.float32), None, {"output_dtype": INT8}),
        (f(4, 6), np.array(0.01, np.float32), helper.make_tensor("z", INT8, [], [5]), {}),
        (f(4, 6), np.array(0.01, np.float32), helper.make_tensor("z", UINT8, [], [128]), {}),
        (f(4, 6), pos(6) / 50, helper.make_tensor("z", INT8, [6], [0, 1, 2, -3, 4, 5]), {}),
        (f(4, 6), pos(4) / 50, helper.make_tensor("z", INT8, [4], [0] * 4), {"axis": 0}),
        (f(4, 6), pos(4) / 50, None, {"axis": -2, "output_dtype": INT8}),
        (f(4, 6), pos(2, 6) / 50, None, {"axis": 0, "block_size": 2, "output_dtype": INT8}),
        (f(4, 7), pos(4, 3) / 50, helper.make_tensor("z", INT8, [4, 3], range(12)), {"axis": 1, "block_size": 3}),
        (np.array([0.5, 1.5, 2.5, -0.5], np.float32), np.array(1, np.float32), None, {"output_dtype": INT8}),
        (f(4, 6) * 100, np.array(0.5, np.float32), helper.make_tensor("z", FLOAT8, [], [0.0]), {}),
        (f(4, 6) * 9, pos(6), None, {"output_dtype": FLOAT8}),
    ],
)
def test_quantization(x: np.ndarray, scale: np.ndarray, zero: Any, attributes: dict[str, Any]) -> None:
    compare(quantized(x, scale, zero, **attributes), {"x": x, "scale": scale})


def test_dequantizes_a_32_bit_bias() -> None:
    feeds = {"x": ints(-(2**30), 2**30, 9).astype(np.int32), "scale": np.array(1e-9, np.float32)}
    compare(model([helper.make_node("DequantizeLinear", ["x", "scale"], ["y0"])], feeds), feeds)


def test_a_cast_to_float8_saturates() -> None:
    feeds = {"x": np.array([1000, -1000, 448, 0.3], np.float32)}
    nodes = [helper.make_node("Cast", ["x"], ["q"], to=FLOAT8), helper.make_node("Cast", ["q"], ["y0"], to=1)]
    compare(model(nodes, feeds), feeds)


@pytest.mark.parametrize("operator", ["RMSNormalization", "LayerNormalization"])
def test_norms_in_bfloat16_compute_in_float32(operator: str) -> None:
    feeds = {"x": f(2, 5, 64) * 30, "w": f(64)}
    bf16 = TensorProto.BFLOAT16
    nodes = [
        helper.make_node("Cast", ["x"], ["xb"], to=bf16),
        helper.make_node("Cast", ["w"], ["wb"], to=bf16),
        helper.make_node(operator, ["xb", "wb"], ["yb"]),
        helper.make_node("Cast", ["yb"], ["y0"], to=TensorProto.FLOAT),
    ]
    (found,) = interpret(model(nodes, feeds), feeds)
    x, w = (torch.from_numpy(feeds[key]).bfloat16().double() for key in "xw")
    x = x - x.mean(-1, keepdim=True) if operator == "LayerNormalization" else x
    expected = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w
    np.testing.assert_allclose(found, expected.numpy(), rtol=2**-7, atol=1e-3)


def test_rms_norm_with_a_scale_of_another_type_gives_the_scales_type() -> None:
    feeds = {"x": f(2, 5, 64), "w": f(64)}
    nodes = [
        helper.make_node("Cast", ["w"], ["wb"], to=TensorProto.BFLOAT16),
        helper.make_node("RMSNormalization", ["x", "wb"], ["yb"]),
        helper.make_node("Cast", ["yb"], ["y0"], to=TensorProto.FLOAT),
    ]
    (found,) = interpret(model(nodes, feeds), feeds)
    x, w = torch.from_numpy(feeds["x"]), torch.from_numpy(feeds["w"]).bfloat16()
    expected = torch.nn.functional.rms_norm(x, (64,), None, 1e-5).bfloat16() * w
    np.testing.assert_array_equal(found, expected.float().numpy())


def test_a_fully_masked_query_gives_zeros() -> None:
    feeds = {"q": f(1, 2, 3, 4), "k": f(1, 2, 5, 4), "v": f(1, 2, 5, 4), "m": np.ones((3, 5), bool)}
    feeds["m"][1] = False
    (found,) = interpret(model([helper.make_node("Attention", list(feeds), ["y0"])], feeds), feeds)
    assert not found[:, :, 1].any()
    assert np.isfinite(found).all()
    assert found[:, :, 0].any()


def test_every_operator_is_tested() -> None:
    tested = {case[0] for case in CASES} | {"Split", "QuantizeLinear", "DequantizeLinear"}
    assert tested >= set(OPS)
    assert set(ONLY) | set(HOST_INPUTS) <= set(OPS)


@pytest.mark.parametrize(
    ("operator", "arrays", "attributes", "named"),
    [
        ("Det", [f(3, 3)], {}, "operator Det"),
        ("Pad", [f(3, 3), i(1, 1, 1, 1)], {"mode": "reflect"}, "mode=reflect"),
        ("Resize", [f(1, 1, 4, 4), None, np.ones(4, np.float32)], {"mode": "linear"}, "mode=linear"),
        ("Conv", [f(1, 1, 4, 4), f(1, 1, 3, 3)], {"auto_pad": "SAME_UPPER"}, "auto_pad=SAME_UPPER"),
        ("Attention", [f(1, 1, 4, 4)] * 6, {}, "too many positional"),
        ("Attention", [f(1, 1, 4, 4)] * 3, {"softcap": 3.0}, "softcap=3.0"),
        ("Conv", [f(1, 1, 4, 4)], {}, "missing a required argument"),
        ("LayerNormalization", [f(3, 4), f(4)], {"stash_type": 16}, "stash_type=16"),
        ("Relu", [f(3)], {"alpha": 1.0}, "alpha"),
    ],
)
def test_what_is_not_covered_is_named(operator: str, arrays: list[Any], attributes: Any, named: str) -> None:
    feeds = {f"x{k}": array for k, array in enumerate(arrays) if array is not None}
    names = [f"x{k}" if array is not None else "" for k, array in enumerate(arrays)]
    starts = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in feeds]
    node = helper.make_node(operator, names, ["y0"], **attributes)
    graph = helper.make_graph([node], "g", starts, [onnx.ValueInfoProto(name="y0")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    with pytest.raises(BackendError, match=named):
        interpret(proto, feeds)


def test_a_second_output_is_refused_only_if_it_is_used() -> None:
    feeds = {"x": f(2, 8), "w": f(8)}
    node = helper.make_node("LayerNormalization", ["x", "w"], ["y0", "mean", "deviation"])
    compare(model([node], feeds), feeds)
    used = helper.make_node("LayerNormalization", ["x", "w"], ["y0", "y1"])
    with pytest.raises(BackendError, match="first output of LayerNormalization"):
        interpret(model([used], feeds, 2), feeds)


@pytest.mark.parametrize("case", PRODUCTS, ids=name)
def test_products_in_bfloat16_are_rounded_once(case: Case) -> None:
    """They differ from those in float64 by half a step of bfloat16 at most, which sums in bfloat16 would not."""
    operator, arrays, attributes = case
    tensors = [a if a is None else torch.from_numpy(a).bfloat16() for a in arrays]
    own = {key: value for key, value in attributes.items() if key not in ("auto_pad", "kernel_shape")}
    found = OPS[operator](*tensors, **own)
    exact = OPS[operator](*(t if t is None else t.double() for t in tensors), **own)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=2**-16)


def test_attention_keeps_no_scores_of_what_is_transposed():
    """As pixels are, whose channels come first. PyTorch's kernel without scores takes heads one after another alone."""
    q, k, v = (torch.randn(1, 1, 16, 64).transpose(2, 3) for _ in range(3))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = layers.attention(q, k, v)
    torch.testing.assert_close(found, torch.softmax(q @ k.mT / 4, -1) @ v)
