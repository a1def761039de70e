from __future__ import annotations

import precisions
import pytest

from zimgkit.export.quantization.prompts import cost_prompts
from zimgkit.runtime import demo_models


def test_a_tiny_model(checkpoint_of, tmp_path, capsys):
    result = precisions.compare(
        checkpoint_of("z-image"), tmp_path, size=64, steps=1, repeats=2, prompts=["a"], precisions=["int4-weights"]
    )
    found = result["precisions"]
    assert list(found) == ["fp32", "bf16", "int4-weights"]
    assert found["fp32"]["denoiser_bytes"] == 2 * found["bf16"]["denoiser_bytes"]
    assert found["int4-weights"]["bytes"] < found["bf16"]["bytes"] < found["fp32"]["bytes"]
    assert all(len(entry["step_seconds"]) == 2 for entry in found.values())
    bf16, int4 = (min(found[name]["cost"]["velocity_cosine"]) for name in ("bf16", "int4-weights"))
    assert 1 >= bf16 > int4 > 0.5
    assert precisions.report(result) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert any(line.startswith("| int4-weights | ") for line in lines)


@pytest.mark.parametrize("name", demo_models.NAMES)
def test_gates_of_the_demo_models(name, tmp_path):
    """What eight bits by the models' own recipes cost in the velocity of each of their default steps.

    One prompt: a cosine is over all numbers of a velocity, and the least of twenty steps is what the bounds are for.
    """
    given = {
        "size": None,
        "steps": None,
        "repeats": 1,
        "prompts": cost_prompts(name)[:1],
        "precisions": ["fp8", "int8"],
    }
    found = precisions.compare(name, tmp_path, **given)["precisions"]
    assert all(len(entry["cost"]["velocity_cosine"]) == 20 for key, entry in found.items() if key != "fp32")
    least = {precision: min(found[precision]["cost"]["velocity_cosine"]) for precision in ("bf16", "fp8", "int8")}
    assert least["bf16"] > 0.9999
    assert least["fp8"] >= 0.999
    assert least["int8"] >= 0.998


@pytest.mark.parametrize(("seconds", "code"), [([0.5, 0.7, 9.0], 0), ([1.1, 1.0, 1.2], 1)])
def test_int8_has_to_be_faster(seconds, code, capsys):
    cost = {"velocity_relative": [0.1, 0.02], "velocity_cosine": [0.998, 0.9999], "psnr": None, "ssim": 0.9}
    entry = {"bytes": 200_000_000, "step_seconds": [1.0, 1.0, 1.0]}
    found = {"fp32": entry, "bf16": entry | {"cost": cost}, "int8": entry | {"cost": cost, "step_seconds": seconds}}
    facts = {"name": "Z", "family": "z-image", "parameters": 10**8, "size": 64, "steps": 2, "prompts": 1}
    assert precisions.report(facts | {"floor": cost, "precisions": found}) == code
    assert "| int8 | 200.0 MB | 100% | " in capsys.readouterr().out
