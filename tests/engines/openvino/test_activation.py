"""SiLU before a cast to bfloat16: found, nearer to the exact one, and others left as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13 as opset

from zimgkit.engines.openvino.activation import activate_before_rounding

F32, BF16 = openvino.Type.f32, openvino.Type.bf16


def normed(activation: Callable[[Any, Any], Any], kind: Any = BF16) -> openvino.Model:
    """Float32 scaled and shifted, cast, and activated.

    Args:
        activation: of the cast and of what was cast.
        kind: to which it is cast.
    """
    x = opset.parameter([-1, 64], F32)
    shifted = opset.add(opset.multiply(x, opset.constant(np.float32(1.7))), opset.constant(np.float32(0.3)))
    return openvino.Model([opset.convert(activation(opset.convert(shifted, kind), shifted), F32)], [x])


def silu(cast: Any, _: Any) -> Any:
    return opset.multiply(cast, opset.sigmoid(cast))


def test_it_is_rounded_once() -> None:
    given = np.random.default_rng(0).standard_normal((500, 64)).astype(np.float32)
    wide = given.astype(np.float64) * np.float32(1.7) + np.float32(0.3)
    exact = wide / (1 + np.exp(-wide))
    errors = []
    for changes in (False, True):
        model = normed(silu)
        assert not changes or activate_before_rounding(model) == 1
        compiled = openvino.Core().compile_model(model, "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})
        errors.append(np.linalg.norm(compiled(given)[0] - exact) / np.linalg.norm(exact))
    # The cast that is left cuts bits off: it may be off by one in 8 bits.
    assert errors[1] < 2**-8
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    "activation",
    [
        lambda cast, _: opset.sigmoid(cast),
        lambda cast, _: opset.add(cast, opset.sigmoid(cast)),
        lambda cast, _: opset.multiply(opset.abs(cast), opset.sigmoid(cast)),
        lambda cast, wide: opset.multiply(opset.convert(opset.abs(wide), BF16), opset.sigmoid(cast)),
        lambda cast, _: opset.multiply(opset.sigmoid(cast), opset.sigmoid(cast)),
    ],
    ids=["a sigmoid alone", "a sum", "another factor", "another cast", "a square"],
)
def test_others_are_left(activation: Callable[[Any, Any], Any]) -> None:
    model = normed(activation)
    assert activate_before_rounding(model) == 0


def test_a_sigmoid_that_others_read_too() -> None:
    def gate(cast: Any, _: Any) -> Any:
        gated = opset.sigmoid(cast)
        return opset.add(opset.multiply(cast, gated), gated)

    assert activate_before_rounding(normed(gate)) == 0


def test_a_cast_to_float16() -> None:
    assert activate_before_rounding(normed(silu, openvino.Type.f16)) == 0
