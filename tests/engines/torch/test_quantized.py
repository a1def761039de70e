"""Products in 8 bits: which are found, and that they give what dequantizing gives, by sums in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from zimgkit.engines.bundle import Bundle
from zimgkit.engines.cpu import adds_integers_exactly
from zimgkit.engines.torch import engine, layers, quantized
from zimgkit.engines.torch.graph import Program, compile_graph, load, read_constant, run
from zimgkit.engines.torch.quantized import (
    FEW_ROWS,
    FLOAT8,
    LINEARS,
    multiplied_types,
    multiply_in_8_bits,
    weights_linear,
)

TYPES = {torch.int8: 1, FLOAT8: 16}
FLOAT, INT8 = TensorProto.FLOAT, TensorProto.INT8
ROWS, WIDTH, OUT = 7, 32, 16
EXACT = pytest.mark.skipif(not adds_integers_exactly(), reason="this CPU has no VNNI: PyTorch's sums of int8 overflow")
"""What an engine never does on such a CPU; there is no other place here for products that GPUs do."""


def count(program: Program) -> int:
    return sum(isinstance(step.call, partial) and step.call.func in LINEARS.values() for step in program.steps)


def count_weights_alone(program: Program) -> int:
    return sum(step.call is weights_linear for step in program.steps)


@pytest.mark.parametrize("dtype", [pytest.param(torch.int8, marks=EXACT), FLOAT8])
@pytest.mark.parametrize("bias", [False, True])
def test_products(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 40, WIDTH) * 50).clamp(-127, 127).to(dtype)
    weight = (torch.randn(OUT, WIDTH) * 50).clamp(-127, 127).to(dtype)
    scale, added = torch.rand(OUT), torch.randn(OUT) if bias else None
    expected = x.double() @ weight.double().T * scale.double() + (added.double() if added is not None else 0)
    for result in (torch.float32, torch.bfloat16):
        found = LINEARS[dtype](x, weight, scale, added, dtype=result)
        assert found.dtype == result and found.shape == (2, 40, OUT)
        tolerance = 1e-6 if result == torch.float32 else 2**-8
        assert float((found.double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.int8, FLOAT8])
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_weights_alone(dtype: torch.dtype, kind: torch.dtype, rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    for width, out in ((WIDTH, OUT), (48, 5), (1280, 64)):
        x, weight = torch.randn(1, rows, width).to(dtype), (torch.randn(out, width) * 50).clamp(-127, 127).to(kind)
        scale, added = torch.rand(out).to(dtype), torch.randn(out).to(dtype) if bias else None
        expected = x.double() @ weight.double().T * scale.double() + (added.double() if added is not None else 0)
        found = weights_linear(x, weight, scale, added)
        assert found.dtype == dtype and found.shape == (1, rows, out)
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7
        assert float((found.double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("rows", [FEW_ROWS, FEW_ROWS + 1])
def test_a_cpu_without_bfloat16_never_multiplies_in_it(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(layers, "PRODUCTS_IN_BFLOAT16", False)
    monkeypatch.setattr(torch, "_weight_int8pack_mm", None)
    x, weight = torch.randn(rows, WIDTH).bfloat16(), torch.randint(-127, 127, (OUT, WIDTH)).to(torch.int8)
    found = weights_linear(x, weight, torch.ones(OUT).bfloat16())
    torch.testing.assert_close(found, (x.float() @ weight.float().T).bfloat16())


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
@torch.inference_mode()
def test_bundles_whose_weights_alone_have_8_bits(quantized_of: Any, family: str, compute: str) -> None:
    """No weight of a denoiser is dequantized any more; the result is as far from float32 as it was."""
    bundle = Bundle.open(quantized_of(family, "int8-weights"), verify=False)
    found, before = (denoised(bundle, compute, types) for types in ({}, None))
    reference, _ = denoised(bundle, "float32", None)
    names = [name for name in bundle.tensors("denoiser") if name.endswith(".weight.scale")]
    assert 10 < count_weights_alone(found[1]) <= len(names)  # Not what nothing reads: the last text.
    assert "DequantizeLinear" not in {step.operator for step in found[1].steps}

    def error(y: torch.Tensor) -> float:
        return float((y - reference).norm() / reference.norm())

    assert error(found[0]) < (1e-5 if compute == "float32" else 1.2 * error(before[0]))


def denoised(bundle: Bundle, compute: str, types: dict[torch.dtype, int] | None) -> tuple[torch.Tensor, Program]:
    """What a denoiser gives for random numbers, and its program; ``types`` None for the graph as it is."""
    entry = bundle.component("denoiser")
    random, sizes = np.random.default_rng(0), {"batch": 1, "all_tokens": 32, "image_tokens": 24}
    graph = entry.graphs[compute]
    program = compile_graph(load(bundle, graph), partial(read_constant, bundle, graph), torch.device("cpu"))
    program = program if types is None else multiply_in_8_bits(program, types)
    feeds = {
        name: torch.from_numpy(
            random.standard_normal([n if isinstance(n, int) else sizes.get(n, 8) for n in spec.shape])
        ).to(program.dtypes[name])
        for name, spec in entry.inputs.items()
    }
    (result,) = run(program, feeds).values()
    return result, program


@pytest.mark.parametrize("precision", [pytest.param("int8", marks=EXACT), "fp8"])
@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
@torch.inference_mode()
def test_bundles(quantized_of: Any, family: str, precision: str) -> None:
    """No weight of a denoiser is dequantized any more; the result is as far from float32 as it was."""
    bundle = Bundle.open(quantized_of(family, precision), verify=False)
    results = {compute: denoised(bundle, compute, None)[0] for compute in ("float32", "bfloat16")}
    _, program = denoised(bundle, "bfloat16", None)
    found, fast = denoised(bundle, "bfloat16", TYPES)
    scales = [name for name in bundle.tensors("denoiser") if name.endswith(".weight.scale")]
    assert count(fast) == len(scales) > 10
    assert "DequantizeLinear" not in {step.operator for step in fast.steps}
    assert len(fast.steps) < len(program.steps)

    def error(y: torch.Tensor) -> float:
        return float((y - results["float32"]).norm() / results["float32"].norm())

    assert error(found) < 1.3 * error(results["bfloat16"])


def graph(**changes: Any) -> Program:
    """A product of quantized tensors, one of whose parts differs from what is found."""
    options = {"transpose": [1, 0], "axis": 0, "zero": [0], "scale": [OUT], "operator": "MatMul", "constant": True}
    options |= changes
    random = np.random.default_rng(1)
    weight = random.integers(-127, 128, (OUT, WIDTH))
    tensors = [
        helper.make_tensor("w", INT8, weight.shape, weight.ravel()),
        helper.make_tensor("s", FLOAT, options["scale"], random.random(options["scale"]).ravel() + 0.5),
        helper.make_tensor("u", FLOAT, [], [0.02]),
        helper.make_tensor("z", INT8, [], options["zero"]),
    ]
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "u", "z"], ["q"]),
        node("DequantizeLinear", ["q", "u", "z"], ["d"]),
        node("DequantizeLinear", ["w", "s"], ["v"], axis=options["axis"], **options.get("more", {})),
        node("Transpose", ["v"], ["t"], perm=options["transpose"]),
        node("MatMul", ["d", "t"], ["y"])
        if options["operator"] == "MatMul"
        else node("Gemm", ["d", "v"], ["y"], transB=1, **options.get("gemm", {})),
    ]
    nodes = [each for each in nodes if options["operator"] == "MatMul" or each.op_type != "Transpose"]
    starts = [helper.make_tensor_value_info("x", FLOAT, ["n", WIDTH])]
    made = helper.make_graph(nodes, "g", starts, [onnx.ValueInfoProto(name="y")], tensors)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)])
    return compile_graph(ir.from_proto(model), partial(read_constant, None, ""), torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        pytest.param({}, 1, marks=EXACT),
        pytest.param({"operator": "Gemm"}, 1, marks=EXACT),
        ({"operator": "Gemm", "gemm": {"alpha": 0.5}}, 0),
        ({"zero": [3]}, 0),
        ({"scale": [1, WIDTH], "axis": 0, "more": {"block_size": OUT}}, 0),
    ],
)
@torch.inference_mode()
def test_what_is_found(changes: dict[str, Any], found: int) -> None:
    program = graph(**changes)
    fast = multiply_in_8_bits(program, TYPES)
    assert count(fast) == found
    x = torch.randn(ROWS, WIDTH)
    torch.testing.assert_close(run(fast, {"x": x})["y"], run(program, {"x": x})["y"], rtol=1e-5, atol=1e-4)
    for types in ({}, {torch.int8: 24}):
        wide = multiply_in_8_bits(program, types)
        assert count(wide) == 0
        # A zero point of what is read is nothing to the weight.
        assert count_weights_alone(wide) == (found or changes == {"zero": [3]})
        torch.testing.assert_close(run(wide, {"x": x})["y"], run(program, {"x": x})["y"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("capability", "types"), [((7, 0), {}), ((8, 6), {torch.int8: 8}), ((9, 0), {torch.int8: 8, FLOAT8: 16})]
)
def test_what_devices_multiply(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], types: dict[torch.dtype, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert multiplied_types(torch.device("cuda", 0)) == types
    assert multiplied_types(torch.device("meta")) == {}
    monkeypatch.setattr(quantized, "cpu_flags", lambda: frozenset({"avx2"}))
    assert multiplied_types(torch.device("cpu")) == {}
    monkeypatch.setattr(quantized, "cpu_flags", lambda: frozenset({"avx_vnni"}))
    assert multiplied_types(torch.device("cpu")) == {torch.int8: 1}


def test_an_engine_multiplies_so(quantized_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "multiplied_types", lambda device: TYPES)
    bundle = Bundle.open(quantized_of("z-image", "int8"), verify=False)
    opened = engine.open_engine(bundle, "denoiser", "cpu", "bfloat16")
    assert count(opened._program) > 10
