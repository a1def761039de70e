"""Compiling a graph: functions, what is kept for how long, and on which side it lives."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from zimgkit.engines.errors import BackendError
from zimgkit.engines.torch.graph import Program, compile_graph, read_constant, run

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def compiled(proto: onnx.ModelProto, device: str = "cpu") -> Program:
    return compile_graph(ir.from_proto(proto), partial(read_constant, None, ""), torch.device(device))


def chain(length: int) -> onnx.ModelProto:
    nodes = [helper.make_node("Exp" if k % 2 else "Neg", [f"t{k}"], [f"t{k + 1}"]) for k in range(length)]
    nodes.insert(3, helper.make_node("Sqrt", ["t1"], ["dead"]))
    starts = [helper.make_tensor_value_info("t0", FLOAT, ["n"])]
    ends = [helper.make_tensor_value_info(f"t{length}", FLOAT, ["n"])]
    graph = helper.make_graph(nodes, "g", starts, ends)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def test_a_value_is_dropped_after_its_last_use_and_dead_nodes_do_not_run() -> None:
    program = compiled(chain(20))
    assert len(program.steps) == 20
    live, peak = set(program.inputs.values()), 0
    for step in program.steps:
        assert live.issuperset(step.inputs)
        live |= set(step.outputs)
        peak = max(peak, len(live))
        live -= set(step.frees)
    assert peak == 2
    assert live == set(program.outputs.values())


def test_runs_do_not_share_values() -> None:
    program = compiled(chain(3))
    first = run(program, {"t0": torch.ones(3)})
    second = run(program, {"t0": torch.zeros(5)})
    assert first["t3"].shape == (3,)
    assert second["t3"].shape == (5,)
    assert all(value is None for value in program.slots)


def test_functions_within_functions_with_attributes_of_the_caller() -> None:
    scale = helper.make_node("Softmax", ["a"], ["b"])
    attribute = onnx.AttributeProto(name="axis", ref_attr_name="axis", type=onnx.AttributeProto.INT)
    scale.attribute.append(attribute)
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("zimg", 1)]
    inner = helper.make_function("zimg", "Inner", ["a"], ["b"], [scale], imports, ["axis"])
    calls = [
        helper.make_node("Inner", ["x"], ["t"], domain="zimg", axis=0),
        helper.make_node("MatMul", ["t", "w"], ["u"]),
        helper.make_node("Inner", ["u"], ["y"], domain="zimg", axis=1),
    ]
    outer = helper.make_function("zimg", "Outer", ["x", "w"], ["y"], calls, imports)
    nodes = [
        helper.make_node("Outer", ["x", "w0"], ["h"], domain="zimg"),
        helper.make_node("Outer", ["h", "w1"], ["y"], domain="zimg"),
    ]
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal((4, 4)).astype(np.float32) for _ in range(2)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", FLOAT, ["n", 4])],
        [numpy_helper.from_array(weight, f"w{k}") for k, weight in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=imports, functions=[inner, outer])
    x = torch.from_numpy(rng.standard_normal((3, 4)).astype(np.float32))
    expected = x
    for weight in weights:
        expected = (expected.softmax(0) @ torch.from_numpy(weight)).softmax(1)
    torch.testing.assert_close(run(compiled(model), {"x": x})["y"], expected)


def test_a_call_of_a_function_that_is_not_there_is_named() -> None:
    graph = helper.make_graph(
        [helper.make_node("Lost", ["x"], ["y"], domain="zimg")],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", FLOAT, ["n"])],
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("zimg", 1)]
    with pytest.raises(BackendError, match=r"operator zimg\.Lost"):
        compiled(helper.make_model(graph, opset_imports=imports))


class Positions(torch.nn.Module):
    """Sizes and positions made from shapes, as text encoders make them, met by floats on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(50, 16)
        self.out = torch.nn.Linear(16, 8)
        self.frequencies = torch.nn.Buffer(torch.rand(8))

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        positions = torch.arange(length, device=x.device)
        mask = (positions[:, None] >= positions[None, :]) & (positions[None, :] != 3)
        angles = positions[:, None].float() * self.frequencies
        h = self.table(ids) + torch.cat((angles.cos(), angles.sin()), -1)
        h = h.view(1, length, 2, 8).transpose(1, 2)
        h = torch.nn.functional.scaled_dot_product_attention(h, h, h, attn_mask=mask[None, None])
        h = torch.nn.functional.pad(h, (0, 0, 0, 2), value=0.5)[:, :, :length]
        h = h.transpose(1, 2).reshape(1, length, 16)
        return self.out(torch.where(mask.any(0)[None, :, None], h, x.new_zeros(()))) + x[:, -length:]


@pytest.fixture(scope="module")
def positions() -> tuple[Positions, onnx.ModelProto]:
    torch.manual_seed(0)
    module = Positions().eval()
    ids, x = torch.arange(7)[None], torch.randn(1, 9, 8)
    shapes = {"ids": {1: torch.export.Dim("length", min=2, max=40)}, "x": {1: torch.export.Dim("rows", min=2, max=50)}}
    program = torch.onnx.export(module, (ids, x), dynamo=True, opset_version=23, dynamic_shapes=shapes, verbose=False)
    return module, program.model_proto


@pytest.mark.parametrize("length", [5, 12])
def test_what_follows_from_shapes_stays_on_the_host(positions: tuple[Positions, onnx.ModelProto], length: int) -> None:
    """The meta device has no values: every number that was read from it, and every mix of devices, would raise."""
    module, proto = positions
    ids, x = torch.randint(0, 50, (1, length)), torch.randn(1, length + 2, 8)
    program = compiled(proto, "meta")
    assert "a copy to the device" in {step.label for step in program.steps}
    (found,) = run(program, {"ids": ids.to("meta"), "x": x.to("meta")}).values()
    assert found.device.type == "meta"
    with torch.inference_mode():
        expected = module(ids, x)
        (same,) = run(compiled(proto), {"ids": ids, "x": x}).values()
    assert found.shape == expected.shape
    torch.testing.assert_close(same, expected)


def test_weights_are_on_the_device_even_if_they_are_integers() -> None:
    weight = np.arange(10_000, dtype=np.int64).reshape(100, 100)
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"]),
        helper.make_node("Gather", ["wt", "i"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("i", INT64, ["n"])],
        [helper.make_tensor_value_info("y", INT64, ["n", 100])],
        [numpy_helper.from_array(weight, "w")],
    )
    program = compiled(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), "meta")
    assert {value.device.type for value in program.slots if value is not None} == {"meta"}
    assert [step.label.split()[0] for step in program.steps] == ["Transpose", "Gather"]


@pytest.mark.parametrize("shape", [(4, 32), (3, 5), (1, 1)])
def test_numbers_of_four_bits(shape: tuple[int, int]) -> None:
    """Two to a byte, and a last one alone where they are odd; all sixteen of them."""
    numbers = (np.arange(np.prod(shape)) % 16 - 8).astype(np.int8).reshape(shape)
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"]), helper.make_node("Mul", ["d", "x"], ["y"])]
    weights = [
        helper.make_tensor("w", TensorProto.INT4, shape, numbers.flatten()),
        helper.make_tensor("s", TensorProto.FLOAT, (), [0.5]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    program = compiled(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
    assert torch.equal(run(program, {"x": torch.ones(shape)})["y"], torch.from_numpy(numbers) * 0.5)
