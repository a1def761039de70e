"""LPIPS: measured by its package, with an imitation of that here, and left out where something is missing."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from tests.export.quality.test_cost import make_run
from zimgkit.export.quality import perceptual
from zimgkit.export.quality.cost import difference
from zimgkit.runtime.commands.inspect import cost_lines


class Imitation(torch.nn.Module):
    """Takes what the package's network takes: (N, 3, height, width), with ``normalize`` from 0 to 1."""

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        assert net == "alex" and not verbose

    def forward(self, x: torch.Tensor, y: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        assert x.shape == y.shape == (1, 3, *x.shape[2:]) and x.dtype == y.dtype == torch.float32
        assert normalize and float(torch.minimum(x, y).min()) >= 0 and float(torch.maximum(x, y).max()) <= 1
        weights = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
        return ((x - y).abs() * weights).mean((1, 2, 3), keepdim=True)


@pytest.fixture
def package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Imitation, __spec__=SimpleNamespace()))


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / perceptual.BACKBONE
    file.parent.mkdir(parents=True)
    file.touch()
    return file


def test_pictures_are_given_as_the_package_takes_them(package, weights):
    distance = perceptual.lpips()
    rng = np.random.default_rng(0)
    x, y = (rng.random((16, 24, 3), dtype=np.float32) for _ in range(2))
    assert distance(x, y) == pytest.approx(float((np.abs(x - y) * [1, 2, 3]).mean()), rel=1e-5)
    assert distance(x, x) == 0


def test_the_cost_has_it(package, weights):
    expected, other = [make_run(0), make_run(1)], [make_run(0), make_run(1)]
    other[0].picture = 1 - expected[0].picture
    found = difference(expected, other, other)
    assert found.lpips == pytest.approx(float(np.abs(1 - 2 * expected[0].picture).mean(axis=(0, 1)) @ [1, 2, 3]) / 6)


def test_people_are_told(package, weights):
    other = make_run(0)
    other.picture = 1 - make_run(0).picture
    found = difference([make_run(0)], [other], [other])
    cost = {"prompts": ["a"], "width": 16, "height": 16, "num_inference_steps": 2, "backend": "onnxruntime"}
    lines = cost_lines(cost | {"difference": msgspec.to_builtins(found), "floor": msgspec.to_builtins(found)})
    assert lines[1].endswith(f", LPIPS {found.lpips:.4f}")


def test_nothing_without_the_weights(package, weights):
    weights.unlink()
    assert perceptual.lpips() is None
    assert difference([make_run(0)], [make_run(0)], [make_run(0)]).lpips is None


def test_nothing_without_the_package(monkeypatch, weights):
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert perceptual.lpips() is None
