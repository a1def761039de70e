"""Graphs before and after, by onnx's reference; what OpenVINO makes of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from zimgkit.engines.bundle import Bundle
from zimgkit.engines.openvino import engine
from zimgkit.engines.openvino.rotation import rotate_halves
from zimgkit.runtime import demo_models

HEADS, DIM = 3, 8


def graph(*, types: bool = False, outputs: tuple[str, ...] = (), **changes: Any) -> onnx.ModelProto:
    """Attention over ``query``, ``key`` and ``value``, (batch, tokens, heads, dim), of which the first two are rotated.

    Args:
        types: whether each is cast before and after.
        outputs: values that are handed out, too.
        changes: ``rotated``, what is; the rotation's ``options`` and its ``more`` inputs; the ``order`` of transposing.
    """
    nodes, ready = [], []
    for name in ("query", "key", "value"):
        last = f"{name}.heads"
        nodes.append(helper.make_node("Transpose", [name], [last], perm=changes.get("order", (0, 2, 1, 3))))
        if name in changes.get("rotated", ("query", "key")):
            options, more = changes.get("options", {"interleaved": 1}), changes.get("more", ())
            if types:
                nodes.append(helper.make_node("Cast", [last], [f"{name}.wide"], to=TensorProto.FLOAT))
                last = f"{name}.wide"
            nodes.append(
                helper.make_node("RotaryEmbedding", [last, "cos", "sin", *more], [f"{name}.turned"], **options)
            )
            last = f"{name}.turned"
            if types:
                nodes.append(helper.make_node("Cast", [last], [f"{name}.back"], to=TensorProto.FLOAT))
                last = f"{name}.back"
        ready.append(last)
    nodes.append(helper.make_node("Attention", ready, ["out"]))
    shapes = dict.fromkeys(("query", "key", "value"), ("batch", "tokens", HEADS, DIM))
    shapes |= dict.fromkeys(("cos", "sin"), ("batch", "tokens", DIM // 2))
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    if "more" in changes:
        inputs.append(helper.make_tensor_value_info("positions", TensorProto.INT64, ("batch", "tokens")))
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in ("out", *outputs)]
    opset = [helper.make_opsetid("", 23)]
    return helper.make_model(helper.make_graph(nodes, "net", inputs, given), opset_imports=opset, ir_version=11)


def feeds(batch: int, tokens: int) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(batch)
    made = {name: random.standard_normal((batch, tokens, HEADS, DIM), np.float32) for name in ("query", "key", "value")}
    return made | {name: random.standard_normal((batch, tokens, DIM // 2), np.float32) for name in ("cos", "sin")}


@pytest.mark.parametrize("types", [False, True])
def test_attention_stays_what_it_is(types: bool) -> None:
    model = graph(types=types)
    before = model.SerializeToString()
    rotate_halves(model)
    onnx.checker.check_model(model)
    ways = [helper.get_attribute_value(node.attribute[0]) for node in model.graph.node if node.op_type[:3] == "Rot"]
    assert ways == [0, 0]
    for batch, tokens in ((1, 5), (2, 9)):
        given = feeds(batch, tokens)
        (right,) = ReferenceEvaluator(onnx.load_from_string(before)).run(None, given)
        (found,) = ReferenceEvaluator(model).run(None, given)
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"rotated": ("query",)},
        {"rotated": ("key",)},
        {"rotated": ()},
        {"outputs": ("key.turned",)},
        {"outputs": ("query.heads",)},
        {"options": {"interleaved": 0}},
        {"options": {}},
        {"options": {"interleaved": 1, "rotary_embedding_dim": 4}},
        {"more": ("positions",)},
        {"order": (0, 1, 2, 3)},
    ],
    ids=lambda changes: " ".join(map(str, changes.items())),
)
def test_what_is_left_alone(changes: dict[str, Any]) -> None:
    """Where the order of a head's numbers is seen, or the rotation is another."""
    model = graph(**changes)
    before = model.SerializeToString()
    rotate_halves(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("name", ["zimg-tiny-z", "zimg-tiny-qwen"])
@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_openvino_fuses_them(monkeypatch: pytest.MonkeyPatch, name: str, has_bfloat16: bool) -> None:
    """One node a rotation; queries and keys are transposed once before it, and keys once after."""
    monkeypatch.setattr(engine, "multiplies_bfloat16", lambda core, place: has_bfloat16)
    opened = engine.open_engine(Bundle.open(demo_models.locate(name)), "denoiser")
    kinds = Counter(node.get_rt_info()["layerType"] for node in opened._model.get_runtime_model().get_ops())
    assert kinds["RoPE"] >= 4
    assert kinds["Transpose"] <= 2 * kinds["RoPE"]
