"""A graph that calls operators of ``plugins/``, by what PyTorch gives for them where no kernel is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import quantized
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.torch import operators
from zimgkit.engines.torch.engine import open_engine
from zimgkit.plugins.manifest import read_manifest
from zimgkit.plugins.pytorch import OPERATORS, module_of

CALLS: dict[str, Callable[..., Any]] = {k: v for name in OPERATORS for k, v in module_of(name).CALLS.items()}


def both(
    monkeypatch: pytest.MonkeyPatch, root: Path, compute: str, calls: dict[str, Any]
) -> tuple[Any, Any, list[str]]:
    """Results of a denoiser without and with operators, and the operators that were called."""
    called: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        def call(*inputs: torch.Tensor, **attributes: Any) -> Any:
            called.append(name)
            return calls[name](*inputs, **attributes)

        return call

    bundle = Bundle.open(root)
    inputs = bundle.component("denoiser").inputs
    tokens = {"batch": 2, "image_tokens": 32, "caption_tokens": 32, "text_tokens": 5}
    tokens["all_tokens"] = 32 + (32 if "caption" in inputs else 5)
    rng = np.random.default_rng(0)
    feeds = {
        name: rng.standard_normal([tokens[x] if isinstance(x, str) else x for x in spec.shape], np.float32)
        for name, spec in inputs.items()
    }
    feeds = {name: value > 1 if inputs[name].dtype == "bool" else value for name, value in feeds.items()}
    results = []
    for found in ({}, {name: noted(name) for name in calls}):
        monkeypatch.setattr(operators, "operators", lambda device, dtype, found=found: found)
        with closing(open_engine(bundle, "denoiser", "cpu", compute)) as engine:
            results.append(next(iter(engine.run(feeds).values())))
    return (*results, called)


@pytest.mark.parametrize(("family", "calls"), [("z-image", 16), ("qwen-image", 15)])
def test_a_step(bundle_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str, calls: int) -> None:
    expected, found, called = both(monkeypatch, bundle_of(family, "bf16"), "float32", CALLS)
    assert quantized.relative(found, expected) < 1e-5
    assert len(called) == calls


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4-weights"])
def test_a_step_of_a_quantized_bundle(
    quantized_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Operators round less often than what they stand for: they are closer to float32. Every call asks for a kernel."""
    asked: list[bool] = []

    def queue(operator: str, kernel: str, device: torch.device, **arguments: Any) -> bool:
        # Tensors on a device are aligned.
        values = {k: 0 if v is None or isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        asked.append(read_manifest(operator).kernels[kernel].takes(values))
        return False

    for name in OPERATORS:
        monkeypatch.setattr(module_of(name), "queue", queue)
    root = quantized_of("z-image", precision)
    body, found, called = both(monkeypatch, root, "bfloat16", CALLS)
    exact, _, _ = both(monkeypatch, root, "float32", {})
    assert quantized.relative(found, exact) < quantized.relative(body, exact) < 0.1
    assert sum(name.startswith("QuantizedLinear") for name in called) >= 12
    if precision != "int4-weights":  # Blocks of so small a model are smaller than a tile.
        assert all(asked)
        assert len(asked) == len(called)
