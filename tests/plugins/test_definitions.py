"""The body of every operator on ONNX Runtime, against its reference in numpy and what it is in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from zimgkit.plugins.definition import Definition
from zimgkit.plugins.gate_norm_modulate import definition as gates
from zimgkit.plugins.gate_norm_modulate.reference import gate_norm_modulate, round_to_float8
from zimgkit.plugins.gate_norm_modulate.torch import BY_NAME
from zimgkit.plugins.pytorch import module_of
from zimgkit.plugins.qk_norm_rope import definition as rotations
from zimgkit.plugins.qk_norm_rope.reference import joint_qk_norm_rope, qk_norm_rope
from zimgkit.plugins.quantized_linear import definition as linears
from zimgkit.plugins.quantized_linear.reference import quantized_linear, round_rows, weights_linear

Arrays = dict[str, np.ndarray]
TYPES = {"float32": TensorProto.FLOAT, "int8": TensorProto.INT8, "float8_e4m3fn": TensorProto.FLOAT8E4M3FN}


def run_bodies(definitions: Sequence[Definition], arrays: Arrays, attributes: dict[str, Any]) -> list[list[np.ndarray]]:
    """One call of each in one graph, on ONNX Runtime."""
    nodes, outputs = [], []
    for definition in definitions:
        names = [f"{definition.name}.{name}" for name in definition.outputs]
        own = {name: attributes[name] for name in definition.attributes}
        nodes.append(helper.make_node(definition.name, definition.inputs, names, domain="zimg", **own))
        outputs += [helper.make_empty_tensor_value_info(name) for name in names]
    used = {name: arrays[name] for definition in definitions for name in definition.inputs}
    inputs = [helper.make_tensor_value_info(name, TYPES[str(a.dtype)], a.shape) for name, a in used.items()]
    graph = helper.make_graph(nodes, "bodies", inputs, outputs)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("zimg", 1)]
    functions = [onnx.parser.parse_function(definition.text) for definition in definitions]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results = session.run(None, used)  # Bytes where float8 is meant.
    found = iter([each.view(ml_dtypes.float8_e4m3fn) if each.dtype == np.uint8 else each for each in results])
    return [[next(found) for _ in definition.outputs] for definition in definitions]


def in_torch(operator: str, definition: Definition, arrays: Arrays, attributes: dict[str, Any]) -> list[np.ndarray]:
    own = {name: attributes[name] for name in definition.attributes}
    inputs = [torch.from_numpy(arrays[name]) for name in definition.inputs]
    result = module_of(operator).CALLS[definition.name](*inputs, **own)
    return [each.float().numpy() for each in (result if isinstance(result, list) else [result])]


def near(found: Any, expected: Any, tolerance: float = 2e-6) -> bool:
    assert found.shape == expected.shape
    return bool(np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected))


@pytest.mark.parametrize(("batch", "tokens", "heads", "width"), [(1, 33, 3, 16), (2, 7, 5, 128), (3, 1, 1, 2)])
def test_qk_norm_rope(batch: int, tokens: int, heads: int, width: int) -> None:
    rng = np.random.default_rng(tokens)
    angles = rng.uniform(-9, 9, (batch, tokens + 4, width // 2))
    shapes = {"x": (batch, tokens, heads, width), "context": (batch, 4, heads, width)}
    shapes |= {"weight": (width,), "context_weight": (width,)}
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    arrays |= {"cos": np.cos(angles, dtype=np.float32), "sin": np.sin(angles, dtype=np.float32)}
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    alone = dict(arrays) | {name: arrays[name][:, 4:] for name in ("cos", "sin")}
    for definition, given, expected in (
        (rotations.DEFINITIONS[0], arrays, joint_qk_norm_rope(**wide, epsilon=1e-5)),
        (
            rotations.DEFINITIONS[1],
            alone,
            qk_norm_rope(wide["x"], wide["weight"], wide["cos"][:, 4:], wide["sin"][:, 4:], epsilon=1e-5),
        ),
    ):
        ((found,),) = run_bodies([definition], given, {"epsilon": 1e-5})
        assert near(found, expected)
        assert near(*in_torch("qk_norm_rope", definition, given, {"epsilon": 1e-5}), expected)


@pytest.mark.parametrize(("batch", "tokens", "width"), [(2, 9, 48), (1, 3, 256)])
@pytest.mark.parametrize("rows", ["one", "by token"])
def test_gate_norm_modulate(batch: int, tokens: int, width: int, rows: str) -> None:
    """All forms at once; modulation may be one row, or one for each token."""
    rng = np.random.default_rng(width)
    row = (1, width) if rows == "one" else (tokens, width)
    shapes = dict.fromkeys(("x", "branch"), (batch, tokens, width)) | dict.fromkeys(("gate", "factor", "shift"), row)
    shapes |= dict.fromkeys(("weight", "branch_weight", "smooth"), (width,))
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    arrays["gate"][0, :4] = [1e-4, -0.02, 0.0999, -9]
    arrays["step"] = np.array(0.03, np.float32)
    attributes = {"epsilon": 1e-6, "branch_epsilon": 1e-5}
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    found = run_bodies(gates.DEFINITIONS, arrays, attributes)
    for definition, mine in zip(gates.DEFINITIONS, found, strict=True):
        expected = gate_norm_modulate(BY_NAME[definition.name], wide, **attributes)
        its = in_torch("gate_norm_modulate", definition, arrays, attributes)
        for one, two, three in zip(mine, its, expected, strict=True):
            # A number between two of 8 bits may go to either.
            tolerance = 2e-2 if one.dtype.itemsize == 1 else 2e-6
            assert near(one.astype(np.float64), three, tolerance), definition.name
            assert near(two, three, tolerance), definition.name


def test_float8_is_rounded_as_its_library_rounds_it() -> None:
    values = np.random.default_rng(0).standard_normal(4000) * np.geomspace(1e-4, 300, 4000)
    values = np.clip(values, -448, 448)
    assert (round_to_float8(values) == values.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)).all()


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("rows", "width", "out"), [((2, 3), 32, 24), ((1,), 64, 16)])
def test_quantized_linear(kind: str, rows: tuple[int, ...], width: int, out: int) -> None:
    rng = np.random.default_rng(width)
    dtype = np.dtype(kind)
    arrays: Arrays = {
        "x": rng.integers(-127, 128, (*rows, width)).astype(dtype),
        "weight": rng.integers(-127, 128, (out, width)).astype(dtype),
        "step": np.array(0.02, np.float32),
        "scale": rng.uniform(0.001, 0.01, out).astype(np.float32),
        "bias": rng.standard_normal(out, np.float32),
    }
    floats = {name: array.astype(np.float64) for name, array in arrays.items()}
    unrounded = arrays | {"x": rng.standard_normal((*rows, width), np.float32)}
    for definition in linears.DEFINITIONS:
        bias = floats["bias"] if definition.name.endswith("bias") else None
        given = arrays
        if "blocks" in definition.name or definition.name.startswith("RoundRows"):
            continue
        if "weights" in definition.name:
            given, x = unrounded, unrounded["x"].astype(np.float64)
            expected = weights_linear(x, floats["weight"], floats["scale"], bias)
        else:
            expected = quantized_linear(floats["x"], floats["step"], floats["weight"], floats["scale"], bias)
        if kind == "int8":  # ONNX Runtime has no product of the other.
            ((found,),) = run_bodies([definition], given, {})
            assert near(found, expected), definition.name
        views = given if kind == "int8" else {n: a.view(np.uint8) if a.dtype == dtype else a for n, a in given.items()}
        tensors = [torch.from_numpy(views[name]) for name in definition.inputs]
        tensors = [t.view(torch.float8_e4m3fn) if t.dtype == torch.uint8 else t for t in tensors]
        mine = module_of("quantized_linear").CALLS[definition.name](*tensors).numpy()
        assert near(mine, expected), definition.name


@pytest.mark.parametrize("bias", [True, False])
def test_four_bits(bias: bool) -> None:
    """Packed two to a byte, with a scale for each block of a row."""
    module, rng = module_of("quantized_linear"), np.random.default_rng(0)
    weight = rng.integers(-8, 8, (24, 64)).astype(np.int8)
    x, scale = rng.standard_normal((2, 5, 64), np.float32), rng.uniform(0.01, 0.1, (24, 4)).astype(np.float32)
    addend = rng.standard_normal(24, np.float32) if bias else None
    expected = weights_linear(x.astype(np.float64), weight, scale.astype(np.float64), addend)
    packed = module.pack(torch.from_numpy(weight))
    assert packed.shape == (24, 32)
    for stored in (packed, torch.from_numpy(weight)):
        given = [torch.from_numpy(each) for each in (scale, *([] if addend is None else [addend]))]
        found = module.CALLS["QuantizedLinear_blocks"](torch.from_numpy(x), stored, *given, block_size=16)
        assert near(found.numpy(), expected)
    nodes = {"x": x, "weight": weight, "scale": scale} | ({} if addend is None else {"bias": addend})
    name = "QuantizedLinear_blocks_bias" if bias else "QuantizedLinear_blocks"
    (definition,) = (each for each in linears.DEFINITIONS if each.name == name)
    ((found,),) = run_bodies([definition], nodes, {"block_size": 16})
    assert near(found, expected)


@pytest.mark.parametrize("step", [None, 0.04])
@pytest.mark.parametrize("smooth", [True, False])
def test_rows_are_rounded(step: float | None, smooth: bool) -> None:
    rng = np.random.default_rng(1)
    x, factor = rng.standard_normal((2, 7, 48), np.float32), rng.uniform(0.5, 2, 48).astype(np.float32)
    x[1, 3] = 0
    given = None if step is None else np.array(step, np.float32)
    expected, steps = round_rows(x, given, factor if smooth else None)
    found, own = module_of("quantized_linear").round_rows(
        torch.from_numpy(x),
        None if given is None else torch.from_numpy(given),
        torch.from_numpy(factor) if smooth else None,
        torch.int8,
    )
    assert (found.numpy() == expected).mean() > 0.999
    assert near(own.numpy(), steps)
    if given is not None:
        name = "RoundRows_smooth_int8" if smooth else "RoundRows_int8"
        definitions = [each for each in linears.DEFINITIONS if each.name in (name, "RoundRows_float8")]
        arrays = {"x": x, "smooth": factor, "step": given}
        for definition, (body,) in zip(definitions, run_bodies(definitions, arrays, {}), strict=True):
            exact = expected if definition.name == name else round_to_float8(x / given)
            (mine,) = in_torch("quantized_linear", definition, arrays, {})
            assert near(body.astype(np.float32), exact, 2e-2)
            assert near(mine, exact, 2e-2)
