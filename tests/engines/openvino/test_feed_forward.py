"""Gated feed-forwards that OpenVINO cannot run as one: found, unchanged in what they give, and no crash."""

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

from zimgkit.engines.openvino import feed_forward
from zimgkit.engines.openvino.feed_forward import ends_in_a_crash, keep_apart

DRAWN = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from zimgkit.runtime import Pipeline
with Pipeline.open(sys.argv[1], backend="openvino", warn=lambda _: None) as pipeline:
    print(pipeline("a red star", height=32, width=32, num_inference_steps=2, seed=0).images[0].size)
"""


def gated(width: int, kind: Any) -> openvino.Model:
    """down(silu(gate(x)) * up(x)), and a product of what a constant scales."""
    random = np.random.default_rng(0)
    x = opset.parameter([-1, width], kind)

    def product(value: Any, rows: int, columns: int) -> Any:
        weight = opset.constant(random.standard_normal((rows, columns)).astype(kind) / 8)
        return opset.matmul(value, weight, False, False)

    gate = product(x, width, 2 * width)
    inner = opset.multiply(opset.multiply(gate, opset.sigmoid(gate)), product(x, width, 2 * width))
    scaled = opset.multiply(x, opset.constant(kind(0.5)))
    return openvino.Model([opset.add(product(inner, 2 * width, width), product(scaled, width, width))], [x])


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_they_give_the_same(kind: Any) -> None:
    given = np.random.default_rng(1).standard_normal((5, 16)).astype(kind)
    results = []
    for changes in (False, True):
        model = gated(16, kind)
        assert not changes or keep_apart(model) == 1
        compiled = openvino.Core().compile_model(model, "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})
        results.append(compiled(given)[0])
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    ("cpus", "flags", "threads", "ends"),
    [
        (1, {"amx_bf16"}, "", True),
        (2, {"amx_bf16"}, "1", True),
        (2, {"amx_bf16"}, "", False),
        (1, {"avx2"}, "1", False),
    ],
)
def test_where_they_are_kept_apart(
    cpus: int, flags: set[str], threads: str, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_forward, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(feed_forward.os, "sched_getaffinity", lambda _: {*range(cpus)}, raising=False)
    assert ends_in_a_crash({"INFERENCE_NUM_THREADS": threads} if threads else {}) is ends


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_a_picture_on_one_cpu(family: str, bundle_of: Callable[..., Path]) -> None:
    """With AMX the process ended here by a signal."""
    bundle = bundle_of(family, "bf16")
    done = subprocess.run([sys.executable, "-c", DRAWN, bundle], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(32, 32)\n"
