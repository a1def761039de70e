from __future__ import annotations

import lora_swap
import pytest

FOUND = {
    "build_seconds": 40.0,
    "rebuild_seconds": 10.0,
    "swap_seconds": [1.0, 3.0, 1.5],
    "swap_peak_bytes": 200 << 20,
    "touched_bytes": 300_000_000,
    "weight_bytes": 900_000_000,
}


def test_a_tiny_model(tmp_path, capsys):
    result = lora_swap.compare("z-image", tmp_path, precision="int8-weights", repeats=1, overrides={})
    assert list(result["targets"]) == list(lora_swap.TARGETS)
    some, most = result["targets"].values()
    assert 0 < some["touched_bytes"] < most["touched_bytes"] < most["weight_bytes"]
    for found in (some, most):
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
