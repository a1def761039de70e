from __future__ import annotations

import cache
import pytest
from cache_contestants import CACHES, OFF, Settings


def test_a_race_of_one(tmp_path, capsys):
    """With two layers, and two steps more than those where caches are off."""
    result = cache.race(tmp_path, Settings("qwen-image", size=32, steps=14, layers=2), ["zimg"], repeats=1)
    figures = result["contestants"]["zimg"]
    assert figures.keys() == {*CACHES}
    for name in CACHES:
        assert all(len(figures[name][kind]) == 1 and figures[name][kind][0] > 0 for kind in ("seconds", "cpu_seconds"))
        assert (figures[name]["psnr"] is None) == (name == OFF)
        assert (figures[name]["latents_relative"] == 0) == (name == OFF)
    assert cache.report(result) in (0, 1)
    assert "zimg balanced 1" in capsys.readouterr().out


def figures(seconds):
    return {
        name: {"seconds": [time], "cpu_seconds": [time], "psnr": 30.0, "latents_relative": 0.1}
        for name, time in zip(CACHES, seconds, strict=True)
    }


@pytest.mark.parametrize(
    ("seconds", "broken"),
    [((6.0, 2.9, 2.9, 2.1, 2.1), 0), ((6.0, 3.1, 2.9, 2.1, 2.1), 1), ((6.0, 2.9, 2.9, 2.2, 2.1), 1)],
)
def test_bounds(seconds, broken, capsys):
    settings = vars(Settings("z-image"))
    found = {"zimg": figures(seconds), "cache-dit": {"failed": "no memory"}}
    assert cache.report({"settings": settings, "contestants": found}) == broken
    out = capsys.readouterr().out
    assert "cache-dit did not run: no memory" in out
    assert out.count("BROKEN") == broken
    assert cache.speeds(figures(seconds), "seconds")[CACHES[1]] == pytest.approx(6 / seconds[1])
