"""Where operators of ours are found in the graphs of bundles, and that a graph computes the same with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from zimgkit.engines.bundle import Bundle
from zimgkit.engines.torch.graph import compile_graph, load, read_constant, run
from zimgkit.plugins.gate_norm_modulate import definition as gates
from zimgkit.plugins.matching import rewrite
from zimgkit.plugins.qk_norm_rope import definition as rotations
from zimgkit.plugins.quantized_linear import definition as linears

DEFINITIONS = (*rotations.DEFINITIONS, *gates.DEFINITIONS, *linears.DEFINITIONS)
SIZES = {"batch": 2, "image_tokens": 32, "caption_tokens": 32, "text_tokens": 5}
CPU = torch.device("cpu")

GATE, ROUNDED = "GateNormModulate", {"fp8": "_float8", "int8": "_smooth_int8"}
Z_IMAGE = {"QKNormRope": 2, f"{GATE}_tanh_rms": 1, f"{GATE}_tanh": 1, f"{GATE}_rms": 1, f"{GATE}_layer": 1}
QWEN_IMAGE = {
    "JointQKNormRope": 2,
    f"{GATE}_gate_layer_shift": 2,
    f"{GATE}_layer_shift": 3,
    f"{GATE}_gate": 2,
}
"""Operators of the functions of a denoiser; a block is one for all its calls."""


def feeds(bundle: Bundle, component: str) -> dict[str, torch.Tensor]:
    """Random inputs."""
    maker, found = torch.Generator().manual_seed(0), {}
    inputs = bundle.component(component).inputs
    tokens = SIZES["image_tokens"] + SIZES["caption_tokens" if "caption" in inputs else "text_tokens"]
    for name, spec in inputs.items():
        shape = [(SIZES | {"all_tokens": tokens})[side] if isinstance(side, str) else side for side in spec.shape]
        values = torch.randn(shape, generator=maker)
        found[name] = values > 1 if spec.dtype == "bool" else values
    return found


def results(bundle: Bundle, graph: str, model: ir.Model, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    program = compile_graph(model, partial(read_constant, bundle, graph), CPU)
    with torch.inference_mode():
        return run(program, {name: value.to(program.dtypes[name]) for name, value in given.items()})


def rewritten(root: Path, compute: str, component: str = "denoiser") -> tuple[dict[str, int], ir.Model]:
    """Rewrite a graph, and hold it to give, to the bit, what it gave before: no other backend knows the operators."""
    bundle = Bundle.open(root)
    graph = bundle.component(component).graphs[compute]
    before, after = load(bundle, graph), load(bundle, graph)
    counts = rewrite(after, DEFINITIONS)
    given = feeds(bundle, component)
    expected, found = (results(bundle, graph, model, given) for model in (before, after))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    return dict(counts), after


def left(model: ir.Model) -> set[str]:
    """What remains in the functions that are not the operators."""
    names = {definition.name for definition in DEFINITIONS}
    return {node.op_type for function in model.functions.values() if function.name not in names for node in function}


@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
@pytest.mark.parametrize(("family", "expected"), [("z-image", Z_IMAGE), ("qwen-image", QWEN_IMAGE)])
def test_every_place_of_both_families(
    bundle_of: Callable[..., Path], family: str, expected: dict[str, int], compute: str
) -> None:
    counts, model = rewritten(bundle_of(family, "bf16"), compute)
    assert counts == expected
    assert not left(model) & {"RMSNormalization", "LayerNormalization", "RotaryEmbedding", "Tanh"}


@pytest.mark.parametrize("precision", ["fp8", "int8", "int8-weights", "int4-weights"])
@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_every_place_of_quantized_bundles(quantized_of: Callable[..., Path], family: str, precision: str) -> None:
    """Every weight of 8 or 4 bits is in a linear, and what lies before it is rounded in one pass where that is all."""
    counts, model = rewritten(quantized_of(family, precision), "bfloat16")
    remains = left(model)
    assert not remains & {"RMSNormalization", "LayerNormalization", "RotaryEmbedding", "Tanh"}
    assert not remains & {"QuantizeLinear", "DequantizeLinear"}
    kind = {"int8-weights": "_weights", "int4-weights": "_blocks"}.get(precision, "")
    assert counts[f"QuantizedLinear{kind}{'_bias' if family == 'qwen-image' else ''}"] >= 7
    if precision in ROUNDED:
        norm, gate = ("layer_shift", "gate") if family == "qwen-image" else ("rms", "tanh")
        assert counts[f"{GATE}_{norm}{ROUNDED[precision]}"] >= 1
        assert counts[f"{GATE}_{gate}_{norm}{ROUNDED[precision]}"] >= 1
        assert counts[f"RoundRows{ROUNDED[precision]}"] >= 2


def test_the_refiner_of_captions(bundle_of: Callable[..., Path]) -> None:
    counts, _ = rewritten(bundle_of("z-image", "bf16"), "bfloat16", "conditioner")
    assert counts == {"QKNormRope": 2}


@pytest.mark.parametrize(("family", "component"), [("z-image", "vae_decoder"), ("qwen-image", "text_encoder")])
def test_other_sums_of_products_are_left_alone(bundle_of: Callable[..., Path], family: str, component: str) -> None:
    bundle = Bundle.open(bundle_of(family, "bf16"))
    model = load(bundle, bundle.component(component).graphs["bfloat16"])
    assert not rewrite(model, DEFINITIONS)


TEXT = """
<ir_version: 11, opset_import: ["" : 23, "zimg" : 1]>
net (float[1,t,64] x, float[64] weight, float[1,64] factor, float[1,64] shift) => (float[1,t,64] y) {
  y = zimg.Block (x, weight, factor, shift)
}
<domain: "zimg", opset_import: ["" : 23]>
Block (x, weight, factor, shift) => (y) {
  normed = RMSNormalization <axis = AXIS, epsilon = 0.001> (x, weight)
  scaled = Mul (MUL)
  y = Add (ADD)
}
"""


def changed(*, axis: str = "-1", mul: str = "normed, factor", add: str = "scaled, shift") -> dict[str, int]:
    model = ir.from_onnx_text(TEXT.replace("AXIS", axis).replace("MUL", mul).replace("ADD", add))
    return dict(rewrite(model, DEFINITIONS))


def test_factors_come_in_either_order() -> None:
    assert changed() == changed(mul="factor, normed") == {"GateNormModulate_rms": 1}


@pytest.mark.parametrize("other", [{"axis": "1"}, {"mul": "normed, normed"}, {"add": "scaled, normed"}])
def test_what_computes_something_else_is_left_alone(other: dict[str, Any]) -> None:
    assert changed(**other) == ({} if "mul" not in other else {"GateNormModulate_rms": 1})
