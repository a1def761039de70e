"""Attention of one wide head in parts: what it gives, where, and its memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13 as opset

from tests.engines.openvino.test_engine import errors
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.openvino import attention
from zimgkit.engines.openvino.attention import QUERIES, WIDE, attend_in_parts

F32, BF16 = openvino.Type.f32, openvino.Type.bf16
PEAK = """
import resource, sys
import numpy as np, openvino
from openvino import opset13 as opset
from zimgkit.engines.openvino.attention import attend_in_parts
inputs = [opset.parameter([-1, 1, -1, 256], openvino.Type.f32) for _ in range(3)]
model = openvino.Model([opset.scaled_dot_product_attention(*inputs)], inputs)
assert attend_in_parts(model) == 1
compiled = openvino.Core().compile_model(model, "CPU")
given = np.random.default_rng(0).standard_normal((1, 1, int(sys.argv[1]), 256), np.float32)
compiled([given[:, :, :8]] * 3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
compiled([given] * 3)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def attention_model(
    heads: int = 1, head_dim: int = WIDE, kind: Any = F32, mask: Any = None, causal: bool = False
) -> openvino.Model:
    inputs = [opset.parameter([-1, heads, -1, head_dim], kind) for _ in range(3)]
    return openvino.Model([opset.scaled_dot_product_attention(*inputs, mask, None, causal)], inputs)


def exact(query: Any, key: Any, value: Any) -> Any:
    """In float64, written out."""
    scores = query.astype(np.float64) @ key.astype(np.float64).swapaxes(2, 3) / np.sqrt(query.shape[3])
    weights = np.exp(scores - scores.max(3, keepdims=True))
    return weights @ value / weights.sum(3, keepdims=True)


@pytest.mark.parametrize("head_dim", [WIDE, 384, 512])
@pytest.mark.parametrize(("kind", "worst"), [(F32, 3e-6), (BF16, 0.02)], ids=["float32", "bfloat16"])
def test_what_it_gives(kind: Any, worst: float, head_dim: int) -> None:
    """For one compiled model, tokens that fill parts and that do not, keys of another number, and a batch."""
    random = np.random.default_rng(head_dim)
    model = attention_model(head_dim=head_dim, kind=kind)
    assert attend_in_parts(model) == 1
    assert list(model.output(0).get_partial_shape())[1::2] == [1, head_dim]
    # Other types in and out, for numpy has no bfloat16.
    steps = openvino.preprocess.PrePostProcessor(model)
    for index in range(3):
        steps.input(index).tensor().set_element_type(F32)
    steps.output(0).tensor().set_element_type(F32)
    options = {"INFERENCE_PRECISION_HINT": "bf16" if kind == BF16 else "f32", "INFERENCE_NUM_THREADS": "1"}
    compiled = openvino.Core().compile_model(steps.build(), "CPU", options)
    for batch, queries, keys in ((1, 1, 1), (2, 7, 5), (1, QUERIES, 64), (2, 2 * QUERIES + 3, 72), (1, 12, 12)):
        given = [random.standard_normal((batch, 1, tokens, head_dim), np.float32) for tokens in (queries, keys, keys)]
        (got,) = compiled(given).values()
        wanted = exact(*given)
        assert got.shape == wanted.shape
        assert np.linalg.norm(got - wanted) <= worst * np.linalg.norm(wanted), (batch, queries, keys)


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2},
        {"heads": -1},
        {"head_dim": WIDE - 1},
        {"head_dim": -1},
        {"causal": True},
        {"mask": opset.constant(np.zeros((1, 1, 1, 5), np.float32))},
    ],
    ids=["heads", "any heads", "a narrow head", "any head", "causal", "a mask"],
)
def test_others_are_left(options: dict[str, Any]) -> None:
    model = attention_model(**options)
    assert attend_in_parts(model) == 0
    assert "ScaledDotProductAttention" in [node.get_type_name() for node in model.get_ops()]


def test_a_number_in_the_place_of_a_mask() -> None:
    """As OpenVINO reads ONNX's attention without one."""
    assert attend_in_parts(attention_model(mask=opset.constant(np.float32(0)))) == 1


def test_memory_is_linear_in_the_tokens() -> None:
    """All scores at once would take a quarter of a gigabyte."""
    command = [sys.executable, "-c", PEAK, "8192"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 128 << 20


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_in_a_bundle(family: str, bundle_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """VAEs that encode and decode, as if their heads were wide and their pictures large."""
    found = []

    def counted(model: Any) -> int:
        found.append(attend_in_parts(model))
        return found[-1]

    monkeypatch.setattr(attention, "WIDE", 1)
    monkeypatch.setattr(attention, "QUERIES", 7)
    monkeypatch.setattr("zimgkit.engines.openvino.engine.attend_in_parts", counted)
    assert max(errors(Bundle.open(bundle_of(family))).values()) < 1e-5
    assert sorted(found)[-1] == 1
