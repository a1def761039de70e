"""What training changed, in four bits a weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from zimgkit.engines.errors import CheckpointError
from zimgkit.runtime.demo_models.assembled import add_difference, unpacked
from zimgkit.training.difference import packed, write_difference


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_rounded_with_about_the_best_scale(seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((7, 96)).astype(np.float32)
    values[0] = 0
    codes, scales = packed(values)
    assert codes.shape == (7, 48) and scales.shape == (7,)
    error = np.square(unpacked(codes) * scales[:, None] - values).sum(1)
    tried = np.linspace(0.3, 1.2, 500)[:, None, None] * np.abs(values).max(1)[:, None] / 7 + 1e-12
    best = np.square(np.clip(np.rint(values / tried), -8, 7) * tried - values).sum(2).min(0)
    assert (error <= 1.1 * best + 1e-9).all()
    assert np.sqrt(error[1:] / np.square(values[1:]).sum(1)).max() < 0.15


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
        "a.weight": (torch.uint8, (32, 32)),
        "a.weight.scale": (torch.float32, (32,)),
        "a.bias": (torch.bfloat16, (32,)),
    }
    add_difference(tmp_path / "before", tmp_path / "difference")
    found, wanted = load_file(tmp_path / "before"), after["a.weight"].float()
    assert torch.equal(found["a.bias"], after["a.bias"]) and torch.equal(found["kept"], after["kept"])
    trained = wanted - before["a.weight"].float()
    error = (found["a.weight"].float() - wanted).norm() / trained.norm()
    assert error < 0.15 + 2e-3 / change  # Four bits of the difference, and bfloat16 of the sum.


def test_other_tensors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 2).bfloat16()}, tmp_path / "before")
    for other in ({"a": torch.ones(2, 4).bfloat16()}, {"b": torch.ones(2, 2).bfloat16()}, {"a": torch.ones(2, 2)}):
        save_file(other, tmp_path / "after")
        with pytest.raises(CheckpointError, match=r"has not the tensors of .*; train on from that one"):
            write_difference(tmp_path / "difference", tmp_path / "before", tmp_path / "after")
    assert not (tmp_path / "difference").exists()
