"""The layer list, in the two forms in which TensorRT gives it."""

from __future__ import annotations

import json

import pytest

from zimgkit.export.compilers.tensorrt.layers import Layer, from_inspector, from_log, kinds, not_in_8_bits, unfused

SHAPE = (
    "Name: __mye4417_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], "
    "TacticName: , StreamId: 0, Metadata: "
)
TENSOR = "{ Name: x_myl0, Dimensions: [1,-1,64], Datatype: BFloat16, Format: (Linear) Row major linear format }"


def line(name: str, kind: str, *nodes: str) -> str:
    """As the compiler says it."""
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {TENSOR}, {TENSOR}], Constants: [], Outputs: [ {TENSOR}], "
        f"TacticName: {name}_0x52e33cb3, StreamId: 0, Metadata: {metadata}"
    )


NODES = (
    "node_linear_3 | layers.0 (ZImageBlock)",
    "node_Attention_79 | layers.0 (ZImageBlock)",
    "node_linear | layers.10 (ZImageBlock_1)",
)


def test_lines_of_the_log():
    lines = [SHAPE, line("_gemm_mha_v2_myl0_8", "kgen", *NODES), line("a+b_myl0_5", "gemm", "sum"), "", "Bindings:"]
    assert from_log(lines) == [
        Layer("__mye4417_0_myl0_0", "shape_call", ()),
        Layer("_gemm_mha_v2_myl0_8", "kgen", NODES, ("BFloat16", "BFloat16")),
        Layer("a+b_myl0_5", "gemm", ("sum",), ("BFloat16", "BFloat16")),
    ]
    assert from_log([]) == []


def test_names_with_commas():
    (layer,) = from_log([line("[HostToDeviceCopy, 2] a, b", "kgen", "n | decoder.up_blocks.0 (Up, 2)")])
    assert layer == Layer("[HostToDeviceCopy, 2] a, b", "kgen", ("n | decoder.up_blocks.0 (Up, 2)",), ("BFloat16",) * 2)


def test_the_inspector():
    layers = [
        {"Name": "_gemm_mha_v2_myl0_8", "LayerType": "kgen", "Metadata": f"[ONNX Layer: {NODES[1]}]"},
        {
            "Name": "g",
            "LayerType": "gemm",
            "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear Int8 format"}],
        },
        {"Name": "s", "LayerType": "shape_call"},
        "a name alone, of a plan that was compiled without details",
    ]
    assert from_inspector(json.dumps({"Layers": layers, "Bindings": ["x"]})) == [
        Layer("_gemm_mha_v2_myl0_8", "kgen", (NODES[1],)),
        Layer("g", "gemm", (), ("Int8",)),
        Layer("s", "shape_call", ()),
    ]
    assert from_inspector("{}") == []


def fused(*calls: str, name: str = "_gemm_mha_v2_myl0_3") -> Layer:
    return Layer(name, "kgen", tuple(f"node_{i} | {call} (Block)" for call in calls for i in range(3)))


@pytest.mark.parametrize(
    ("layers", "times", "expected"),
    [
        ([], 1, ("layers.0", "layers.1")),
        ([fused("layers.0"), fused("layers.1")], 1, ()),
        ([fused("layers.0", "layers.1")], 1, ()),
        ([fused("layers.1")], 1, ("layers.0",)),
        ([fused("layers.0", name="__myl_MulSoftmax"), fused("layers.1")], 1, ("layers.0",)),
        ([fused("layers.10"), fused("layers.1")], 1, ("layers.0",)),  # layers.1 is not a part of layers.10.
        # With two profiles each block is there twice, and both must be fused.
        ([fused("layers.0"), fused("layers.1")], 2, ("layers.0", "layers.1")),
        ([fused("layers.0"), fused("layers.1"), fused("layers.1", name="_gemm_mha_v2_myl1_3")], 2, ("layers.0",)),
        ([fused("layers.0"), fused("layers.1")] * 2, 2, ()),
    ],
)
def test_attention_that_is_not_fused(layers, times, expected):
    assert unfused(layers, ("layers.0", "layers.1"), times) == expected


def test_without_attention_nothing_is_unfused():
    assert unfused([fused("layers.0")], ()) == ()


def test_kinds_come_by_number():
    layers = [Layer("", kind, ()) for kind in ("gemm", "kgen", "kgen", "wait", "kgen", "gemm")]
    assert list(kinds(layers).items()) == [("kgen", 3), ("gemm", 2), ("wait", 1)]


def test_products_that_are_not_in_8_bits():
    products = ("q | layers.0", "q | layers.1", "k | layers.0")
    layers = [
        Layer("q+k", "gemm", ("q | layers.0 (B)", "k | layers.0 (B)", "k | layers.0 (B)"), ("Int8", "Float")),
        Layer("dequantized", "kgen", ("q | layers.1 (B)",), ("Int8",)),
        Layer("q", "gemm", ("q | layers.1 (B)",), ("BFloat16", "Int8")),
    ]
    assert not_in_8_bits(layers, products) == ("q | layers.1",)
    assert not_in_8_bits([*layers, Layer("q", "gemm", ("q | layers.1 (B)",), ("FP8",))], products) == ()
    assert not_in_8_bits(layers[:1], ("q | layers.0",), 2) == ("q | layers.0",)
