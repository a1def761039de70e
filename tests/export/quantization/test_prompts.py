"""The prompts that are taken where none are named."""

from __future__ import annotations

import pytest

from zimgkit.export.quantization.prompts import calibration_prompts, cost_prompts
from zimgkit.training.world.words import COLOURS


@pytest.mark.parametrize("name", ["Qwen-Image", "zimg-tiny-z"])
def test_those_of_a_cost_are_none_of_a_calibrations(name):
    calibration, cost = calibration_prompts(name), cost_prompts(name)
    assert len(set(calibration)) == 12 and len(set(cost)) == 3
    assert not set(cost) & set(calibration)
    for prompts in (calibration, cost):
        assert any(not prompt.isascii() for prompt in prompts)
        assert all(prompt == prompt.strip() != "" for prompt in prompts)


def test_the_demo_models_get_what_they_know():
    prompts = calibration_prompts("zimg-tiny-qwen") + cost_prompts("zimg-tiny-z")
    assert all(any(colour in prompt for colour in COLOURS) for prompt in prompts if prompt.isascii())
    assert calibration_prompts("Z-Image-Turbo") != calibration_prompts("zimg-tiny-z")
