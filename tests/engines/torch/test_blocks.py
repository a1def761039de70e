"""Programs folded for known shapes, and their blocks compiled: against the program that is interpreted."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from zimgkit.engines.bundle import Bundle
from zimgkit.engines.torch import blocks, runners
from zimgkit.engines.torch.graph import Program, compile_graph, load, read_constant, run
from zimgkit.engines.torch.specialised import Bound, specialise

FLOAT = TensorProto.FLOAT
FAMILIES = ("z-image", "qwen-image")


def feeds_of(bundle: Bundle, component: str, program: Program, length: int) -> dict[str, torch.Tensor]:
    """Random inputs, of lengths that differ from one another."""
    random, sizes = (
        np.random.default_rng(length),
        {"batch": 1, "all_tokens": 24 + 2 * length, "image_tokens": 24 + length},
    )
    found = {}
    for name, spec in bundle.component(component).inputs.items():
        shape = [side if isinstance(side, int) else sizes.get(side, length) for side in spec.shape]
        values = random.standard_normal(shape) if "float" in spec.dtype else random.integers(0, 2, shape)
        found[name] = torch.from_numpy(values.astype("float32" if "float" in spec.dtype else spec.dtype))
        found[name] = found[name].to(program.dtypes[name])
    return found


def program_of(bundle: Bundle, component: str, compute: str = "float32") -> Program:
    graph = bundle.component(component).graphs[compute]
    return compile_graph(load(bundle, graph), partial(read_constant, bundle, graph), torch.device("cpu"))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_what_follows_from_shapes_is_folded(bundle_of: Any, quantized_of: Any, family: str, precision: str) -> None:
    """Every component, of three lengths: the same numbers to the bit, through blocks that are called as one as well."""
    root = bundle_of(family) if precision == "fp32" else quantized_of(family, precision)
    bundle = Bundle.open(root, verify=False)
    for component, entry in bundle.manifest.components.items():
        if not entry.graphs:
            continue
        program, kinds, first = program_of(bundle, component), dict[str, Any](), 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "compile_block", lambda module: module)
            for length in (8, 11, 8):
                feeds = feeds_of(bundle, component, program, length)
                folded = specialise(program, feeds)
                assert not {step.operator for step in folded.steps} & {"Shape", "Size", "Range"}
                assert all(isinstance(step.call, Bound) for step in folded.steps)
                expected = run(program, feeds)
                for name, found in run(folded, feeds).items():
                    assert torch.equal(found, expected[name])
                grouped = blocks.by_block(folded, kinds)
                first = first or len(kinds)
                for name, found in run(grouped, feeds).items():
                    assert torch.equal(found, expected[name])
        if component == "denoiser":
            # Blocks alike are one kind, and another length has none of its own.
            assert len(kinds) == first < len(grouped.steps)


def two_layers(width: int = 8) -> ir.Model:
    """Two calls of a function that slices by a size and reshapes, gelu((x w)[:, : tokens of z])."""
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("zimg", 1)]
    body = [
        helper.make_node("Constant", [], ["zero"], value_ints=[0]),
        helper.make_node("Constant", [], ["one"], value_ints=[1]),
        helper.make_node("Constant", [], ["shape"], value_ints=[0, 0, 2, -1]),
        helper.make_node("Shape", ["z"], ["size"], start=1, end=2),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Slice", ["h", "zero", "size", "one"], ["cut"]),
        helper.make_node("Reshape", ["cut", "shape"], ["heads"]),
        helper.make_node("Constant", [], ["flat"], value_ints=[0, 0, -1]),
        helper.make_node("Reshape", ["heads", "flat"], ["together"]),
        helper.make_node("Gelu", ["together"], ["y"]),
    ]
    function = helper.make_function("zimg", "Layer", ["x", "z", "w"], ["y"], body, imports)
    calls = [
        helper.make_node("Layer", ["x", "z", "0.w"], ["h"], "layers.0", domain="zimg"),
        helper.make_node("Layer", ["h", "z", "1.w"], ["y"], "layers.1", domain="zimg"),
    ]
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.standard_normal((width, width)).astype(np.float32), f"{k}.w") for k in range(2)
    ]
    inputs = [helper.make_tensor_value_info(name, FLOAT, [1, name + "n", width]) for name in "xz"]
    outputs = [helper.make_tensor_value_info("y", FLOAT, [1, "m", width])]
    graph = helper.make_graph(calls, "g", inputs, outputs, weights)
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, functions=[function]))


def lengths(x: int, z: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(1, x, 8), "z": torch.randn(1, z, 8)}


@pytest.fixture
def program() -> Program:
    return compile_graph(two_layers(), partial(read_constant, None, ""), torch.device("cpu"))


@torch.inference_mode()
def test_torch_compile_serves_both_layers_and_all_lengths(program: Program) -> None:
    """Without a break of the graph, which would raise; compiled once, with sizes that were not met before."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler here, which torch.compile needs on a CPU")
    from torch._dynamo.utils import counters

    counters.clear()
    runner = runners.Runners(program, compiled=True)
    for x, z in ((7, 5), (9, 6), (30, 30), (7, 5)):
        feeds = lengths(x, z)
        torch.testing.assert_close(runner(feeds)["y"], run(program, feeds)["y"], rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@torch.inference_mode()
def test_few_shapes_stay_prepared(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(blocks, "compile_block", lambda module: made.append(module) or module)
    runner = runners.Runners(program, compiled=True)
    for length in (*range(2, 30), 3):
        feeds = lengths(length + 1, length)
        torch.testing.assert_close(runner(feeds)["y"], run(program, feeds)["y"])
    assert len(runner._prepared) == runners.SHAPES
    assert len(made) == 1


@torch.inference_mode()
def test_a_size_that_depends_on_values_is_told() -> None:
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    inputs = [
        helper.make_tensor_value_info("x", FLOAT, ["n"]),
        helper.make_tensor_value_info("shape", TensorProto.INT64, [2]),
    ]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", FLOAT, ["a", "b"])])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]))
    program = compile_graph(model, partial(read_constant, None, ""), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="Reshape 'y' reads numbers that depend on more than shapes"):
        specialise(program, {"x": torch.zeros(4), "shape": torch.tensor([2, 2])})


def test_blocks_that_differ_are_told_apart(program: Program) -> None:
    steps = specialise(program, lengths(7, 5)).steps
    assert {step.block for step in steps} == {"layers.0", "layers.1"}
    first = [step for step in steps if step.block == "layers.0"]
    inputs, outputs = blocks._borders(first, {first[-1].outputs[0]})
    kind, sizes = blocks.describe(first, inputs, outputs)
    assert sizes == (5,)
    for index, step in enumerate(first):
        call = step.call
        assert isinstance(call, Bound)
        other = [*first]
        other[index] = step._replace(call=Bound(call.function, call.arguments, {**call.keywords, "other": 1}))
        assert blocks.describe(other, inputs, outputs)[0] != kind
    longer = [step for step in specialise(program, lengths(9, 6)).steps if step.block == "layers.0"]
    assert blocks.describe(longer, inputs, outputs) == (kind, (6,))
