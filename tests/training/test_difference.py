"""What training changed, in eight bits a weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from zimgkit.engines.errors import CheckpointError
from zimgkit.runtime.demo_models.assembled import add_difference
from zimgkit.training.difference import rounded, write_difference


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_rounded_to_half_of_a_step(seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((7, 95)).astype(np.float32)
    values[0] = 0
    codes, scales = rounded(values)
    assert codes.shape == values.shape and codes.dtype == np.int8 and scales.shape == (7,)
    assert (np.abs(codes[1:].astype(int)).max(1) == 127).all() and not codes[0].any()
    np.testing.assert_allclose(scales[1:], np.abs(values[1:]).max(1) / 127, rtol=1e-6)
    assert (np.abs(codes * scales[:, None] - values) <= 0.5001 * scales[:, None]).all()


@pytest.mark.parametrize("change", [1e-3, 0.1, 1.0])
def test_there_and_back(change: float, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    before = {"a.weight": torch.randn(32, 64, generator=generator), "a.bias": torch.randn(32, generator=generator)}
    before = {name: value.bfloat16() for name, value in (before | {"kept": torch.ones(4, 4)}).items()}
    after = before | {
        name: (value.float() + change * torch.randn(value.shape, generator=generator)).bfloat16()
        for name, value in before.items()
        if name != "kept"
    }
    save_file(before, tmp_path / "before")
    save_file(after, tmp_path / "after")
    write_difference(tmp_path / "difference", tmp_path / "before", tmp_path / "after")
    stored = load_file(tmp_path / "difference")
    assert {name: (value.dtype, tuple(value.shape)) for name, value in stored.items()} == {
        "a.weight": (torch.int8, (32, 64)),
        "a.weight.scale": (torch.float32, (32,)),
        "a.bias": (torch.bfloat16, (32,)),
    }
    add_difference(tmp_path / "before", tmp_path / "difference")
    found, wanted = load_file(tmp_path / "before"), after["a.weight"].float()
    assert torch.equal(found["a.bias"], after["a.bias"]) and torch.equal(found["kept"], after["kept"])
    trained = wanted - before["a.weight"].float()
    error = (found["a.weight"].float() - wanted).norm() / trained.norm()
    assert error < 0.01 + 2e-3 / change  # Eight bits of the difference, and bfloat16 of the sum.


def test_other_tensors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 2).bfloat16()}, tmp_path / "before")
    for other in ({"a": torch.ones(2, 4).bfloat16()}, {"b": torch.ones(2, 2).bfloat16()}, {"a": torch.ones(2, 2)}):
        save_file(other, tmp_path / "after")
        with pytest.raises(CheckpointError, match=r"has not the tensors of .*; train on from that one"):
            write_difference(tmp_path / "difference", tmp_path / "before", tmp_path / "after")
    assert not (tmp_path / "difference").exists()
