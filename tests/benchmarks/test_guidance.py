from __future__ import annotations

import guidance
import numpy as np
import pytest

from zimgkit.engines.base import BaseEngine
from zimgkit.runtime import Pipeline, demo_models

SIGMAS = np.array([1.0, 0.9, 0.7, 0.4, 0.1, 0.0], np.float32)


@pytest.mark.parametrize("way", guidance.WAYS)
def test_an_interval_holds_the_steps_of_its_share(way):
    start, stop = guidance.WAYS[way]
    bounds = guidance.interval(SIGMAS, start, stop)
    held = [bounds["guidance_low"] <= sigma <= bounds["guidance_high"] for sigma in SIGMAS[:-1]]
    assert held == [round(start * 5) <= step < round(stop * 5) for step in range(5)]


@pytest.mark.parametrize("model", demo_models.NAMES)
def test_every_way_is_drawn_and_judged(model, monkeypatch, capsys):
    call = {"num_inference_steps": 5}
    guided = []
    with Pipeline.open(model, backend="onnxruntime", warn=lambda _: None) as pipeline:
        ways = guidance.ways_of(pipeline, call)
        monkeypatch.setattr(BaseEngine, "run_together", watched(BaseEngine.run_together, guided))
        found = guidance.compare(pipeline, ways, call, captions=2)
    assert found.keys() == {*guidance.WAYS, "no step"}
    assert {name for name, own in found.items() if own["psnr"] is None} == {"all steps"}
    for own in found.values():
        assert own["seconds"] > 0 and len(own["right"]) == 2
        assert own["psnr"] is None or own["psnr"] > 5
    # Seven ways and one more; the first pictures have one step each. Two captions follow.
    shares = [*(round(stop * 5) - round(start * 5) for start, stop in guidance.WAYS.values()), 0]
    assert [sum(branches) - len(branches) for branches in in_fives(guided[len(shares) :])] == shares * 2
    result = {"model": model, "captions": 2, "call": call, "ways": found}
    assert guidance.report(result) == 0
    assert "without the first 20 %" in capsys.readouterr().out


def watched(function, counts):
    def run(engine, sets, *arguments, **options):
        counts.append(len(sets))
        return function(engine, sets, *arguments, **options)

    return run


def in_fives(values):
    return [values[start : start + 5] for start in range(0, len(values), 5)]
