from __future__ import annotations

import lora_swap
import pytest

from zimgkit.engines.tensors.safetensors import read_header

FOUND = {
    "build_seconds": 40.0,
    "rebuild_seconds": 10.0,
    "swap_seconds": [1.0, 3.0, 1.5],
    "swap_peak_bytes": 200 << 20,
    "touched_bytes": 300_000_000,
    "weight_bytes": 900_000_000,
}


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_what_loras_are_trained_on(family, checkpoint_of, tmp_path):
    """Every linear of the blocks, and of these those of the attention."""
    modules = {}
    for kind, targets in lora_swap.TARGETS.items():
        lora_swap.write_lora(tmp_path / f"{kind}.safetensors", checkpoint_of(family), targets, seed=1)
        keys = read_header(tmp_path / f"{kind}.safetensors")
        modules[kind] = {key.rpartition(".lora_")[0] for key in keys}
    some, most = modules["attention"], modules["all linears"]
    assert some and some < most


def test_a_tiny_model(tmp_path, capsys, monkeypatch):
    """With one kind of LoRA: each kind's first build traces all networks, which takes most of the test."""
    monkeypatch.setattr(lora_swap, "TARGETS", {"all linears": lora_swap.TARGETS["all linears"]})
    result = lora_swap.compare("z-image", tmp_path, precision="int8-weights", repeats=1, overrides={})
    (found,) = result["targets"].values()
    assert 0 < found["touched_bytes"] < found["weight_bytes"]
    assert len(found["swap_seconds"]) == 1 and 0 < found["swap_seconds"][0] < found["build_seconds"]
    assert found["rebuild_seconds"] < found["build_seconds"]  # It traces nothing.
    lora_swap.report(result)
    assert "build / swap" in capsys.readouterr().out


@pytest.mark.parametrize(("build", "code"), [(31.0, 0), (29.0, 1)])
def test_the_median_counts(build, code, capsys):
    found = {"attention": FOUND | {"build_seconds": build}}
    result = {"family": "z-image", "precision": "bf16", "rank": 32, "targets": found}
    assert lora_swap.report(result) == code
    assert "300 of 900 MB" in capsys.readouterr().out
