"""Ranges against torch's quantiles and a search by hand, smoothing against its formula, files against bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from zimgkit.engines.errors import UsageError, ZimgError
from zimgkit.export.quantization.formats import FLOAT8, INT8
from zimgkit.export.quantization.statistics import BINS, InputStatistics, Statistics, scale_for, smoothing


def seen(*batches: torch.Tensor) -> InputStatistics:
    entry = InputStatistics.empty(batches[0].shape[-1])
    for batch in batches:
        magnitudes = batch.abs()
        entry.add(magnitudes.amax(0).numpy(), lambda top, m=magnitudes: torch.histc(m, BINS, 0, top).double().numpy())
    return entry


def batches(seed: int) -> list[torch.Tensor]:
    """Values whose range grows, then shrinks."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(400, 16, generator=generator) for scale in (1e-6, 0.01, 1, 40, 3)]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_counted(seed):
    values = batches(seed)
    entry, everything = seen(*values), torch.cat(values)
    assert np.array_equal(entry.channels, everything.abs().amax(0).numpy())
    assert entry.absmax == everything.abs().max()
    assert entry.histogram.sum() == everything.numel()
    assert entry.top >= entry.absmax > entry.top / 2
    # Bins that were merged hold what bins of that width would have held, but for values on their borders.
    expected = torch.histc(everything.abs(), BINS, 0, entry.top).double().numpy()
    assert np.abs(np.cumsum(entry.histogram) - np.cumsum(expected)).max() <= 2


@pytest.mark.parametrize("seed", range(3))
def test_ranges(seed):
    values = torch.cat(batches(seed)).abs()
    entry = seen(*batches(seed))
    assert entry.range("max", INT8) == entry.absmax
    exact = torch.quantile(values.flatten().double(), 0.9999).item()
    assert entry.range("percentile", INT8) == pytest.approx(exact, abs=3 * entry.top / BINS)

    def error(largest: float) -> float:
        scale = largest / 127
        return float((values - (values / scale).round().clamp(max=127) * scale).double().square().sum())

    best = entry.range("mse", INT8)
    assert error(best) <= 1.05 * min(error(entry.absmax * n / 64) for n in range(16, 65))
    assert error(best) <= error(entry.absmax)


def test_the_mse_range_clips_what_is_rare():
    values = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    values[0, 0] = 12.0
    assert seen(values).range("mse", INT8) < 10
    assert seen(values).range("mse", FLOAT8) == pytest.approx(12, rel=0.3)  # Small values cost nothing there.


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75, 1.0])
def test_smoothing_is_the_papers_rounded_to_powers_of_two(alpha):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(64, generator=generator) * torch.logspace(-2, 2, 64)
    w = torch.rand(64, generator=generator) * torch.logspace(1, -1, 64)
    expected = x**alpha / w ** (1 - alpha)
    found = torch.from_numpy(smoothing(x.numpy(), w.numpy(), alpha))
    ratio = (found / expected).log2().abs()
    assert ratio.max() <= 0.5 + 1e-5
    assert torch.equal(found.log2(), found.log2().round())


def test_smoothing_leaves_what_is_never_used():
    x, w = np.array([0, 1, 4, 0], np.float32), np.array([1, 0, 4, 0], np.float32)
    assert smoothing(x, w, 0.5).tolist() == [1, 1, 1, 1]
    assert smoothing(x, w, 0).tolist() == [1, 1, 1, 1]


def test_the_scale_of_an_input():
    scale = scale_for(10.0, INT8)
    assert 10 / 127 <= scale <= 10 / 127 * (1 + 2**-7)
    assert torch.tensor(scale).bfloat16().item() == scale
    assert scale_for(0.0, INT8) == 1


def some() -> Statistics:
    inputs = {"denoiser": {"layers.0.to_q.weight": seen(*batches(0))}}
    readers = {"denoiser": dict.fromkeys(["layers.0.to_q.weight", "layers.0.to_k.weight"], "layers.0.to_q.weight")}
    return Statistics(inputs, readers, {"done": 3, "plan": "一"})


def test_a_file_and_back(tmp_path: Path):
    path = tmp_path / "b.calibration.safetensors"
    original = some()
    original.save(path)
    original.save(path)  # Over one that is there.
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    found = Statistics.load(path)
    assert found.readers == original.readers
    assert found.made == original.made
    expected, entry = original.inputs["denoiser"], found.inputs["denoiser"]
    assert entry.keys() == expected.keys()
    for name, value in entry.items():
        assert np.array_equal(value.channels, expected[name].channels)
        assert np.array_equal(value.histogram, expected[name].histogram)
        assert value.top == expected[name].top
    with safe_open(path, "np") as file:  # Ordinary tools read it.
        assert json.loads(file.metadata()["made"]) == original.made
    assert found.first_reader("denoiser", "layers.0.to_k.weight") == "layers.0.to_q.weight"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "b.calibration.safetensors"
    some().save(path)
    before = path.read_bytes()

    def full(*args: object) -> None:
        Path(str(args[0])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zimgkit.export.quantization.statistics.write", full)
    with pytest.raises(OSError, match="No space"):
        some().save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["layers.1.to_q.weight", "x"])
def test_a_linear_that_was_not_calibrated(name):
    for statistics in (some(), Statistics()):
        with pytest.raises(UsageError, match=f"has nothing of {name} of denoiser: it is of another model"):
            statistics.first_reader("denoiser", name)


def test_a_linear_that_never_ran():
    statistics = some()
    statistics.readers["denoiser"]["unread"] = "unread"
    assert statistics.first_reader("denoiser", "unread") is None


@pytest.mark.parametrize("part, value", [
    ("channels", np.array([1, np.nan, 2], np.float32)), ("channels", np.array([1, -1, 2], np.float32)),
    ("channels", np.array([1, np.inf, 2], np.float32)), ("channels", np.array([1, 9, 2], np.float32)),
    ("channels", np.array([[1, 2]], np.float32)), ("channels", np.array([1, 2], np.float64)),
    ("channels", np.zeros(0, np.float32)), ("channels", np.array(1, np.float32)),
    ("histogram", np.full(BINS, np.nan)), ("histogram", -np.ones(BINS)), ("histogram", np.zeros(5)),
    ("histogram", np.full(BINS, np.inf)), ("top", np.array([np.nan])), ("top", np.array([np.inf])),
    ("top", np.zeros(1)), ("top", np.array([-4.0])), ("top", np.zeros(0)), ("top", np.array([2.0**200])),
])  # fmt: skip
def test_numbers_that_no_calibration_has(tmp_path: Path, part, value):
    path = tmp_path / "x.safetensors"
    good = {"channels": np.array([1, 3, 2], np.float32), "histogram": np.ones(BINS), "top": np.array([4.0])}
    metadata = {"kind": "zimg-calibration", "version": "1", "readers": "{}", "made": "{}"}
    save_file({f"c/x/{name}": tensor for name, tensor in good.items()}, path, metadata)
    assert Statistics.load(path).inputs["c"]["x"].absmax == 3
    save_file({f"c/x/{name}": tensor for name, tensor in (good | {part: value}).items()}, path, metadata)
    with pytest.raises(UsageError, match=r"holds no calibration statistics that this zimgkit reads \(x has "):
        Statistics.load(path)


def test_files_that_are_none(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ZimgError, match="does not exist"):
        Statistics.load(path)
    path.write_bytes(b"no")
    with pytest.raises(ZimgError, match="is no safetensors file"):
        Statistics.load(path)
    for metadata in (None, {"kind": "zimg-calibration"}, {"kind": "zimg-calibration", "version": "99"}):
        save_file({"a": np.zeros(3, np.float32)}, path, metadata)
        with pytest.raises(UsageError, match="holds no calibration statistics that this zimgkit reads"):
            Statistics.load(path)
    good = {"kind": "zimg-calibration", "version": "1", "readers": "{}", "made": "{}"}
    save_file({"denoiser/x/channels": np.zeros(3, np.float32)}, path, good)  # No histogram.
    with pytest.raises(UsageError, match="holds no calibration"):
        Statistics.load(path)
