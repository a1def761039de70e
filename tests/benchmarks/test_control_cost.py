from __future__ import annotations

import control_cost
import families
import flops
import pytest
import random_checkpoint

from zimgkit.export.networks.registry import control_net

REAL = {
    "z-image": (55.6e12, 31.8e12, 0.004),
    "qwen-image": (70.6e12, 9.28e12, 0.0002),
}
"""Family -> the operations of a step at 1024x1024, those of a net, and its share that reads the picture alone."""


def test_a_tiny_model(tmp_path, capsys):
    family = "qwen-image"
    config = random_checkpoint.transformer_config(family, tiny=True)
    result = control_cost.compare(family, tmp_path, config, size=64, repeats=2)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in result["seconds"].values())
    assert 0 < result["once"] < result["added"] < result["flops"]
    assert control_cost.report(result) == 0
    assert f"{result['added'] / result['flops']:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize("family", REAL)
def test_the_tensors_and_operations_of_the_releases(family):
    config = families.family(family).configs["transformer"]
    shapes = families.family(family).control.shapes(config)
    assert control_net(family, config, shapes, {}, "net").parameters() == shapes
    step, added, once = REAL[family]
    found, once_found = flops.of_control(family, config, 1024, 1024, 128)
    assert flops.of_step(family, config, 1024, 1024, 128) == pytest.approx(step, rel=0.05)
    assert found == pytest.approx(added, rel=0.02)
    assert once_found / found == pytest.approx(once, rel=0.2)


def test_the_median_counts(capsys):
    seconds = {"denoiser": [1.0, 1.0, 9.0], control_cost.NET: [1.5, 1.2, 1.4]}
    counts = {"flops": 10**12, "added": 10**11, "once": 10**9}
    found = {"family": "z-image", "size": 512, "seconds": seconds, "released": counts | {"flops": 10**13}} | counts
    assert control_cost.report(found) == 0
    out = capsys.readouterr().out
    assert "40.0%" in out and "1.00% of it, 0.091% of a step" in out and "0.10 TFLOP to 10.00" in out
