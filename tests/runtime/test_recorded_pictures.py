"""From a picture, and within a mask, in DiffSynth's words: against what DiffSynth gave (``tests/references``)."""

from __future__ import annotations

import numpy as np
import pytest

from tests.references import recordings
from zimgkit.runtime import Pipeline

BOUND = 1e-4
"""On pixels from 0 to 1."""
TASKS = ("image-to-image", "inpaint")
NAMES = [
    name
    for system in ("qwen-image-img2img", "qwen-image-inpaint", "z-image-img2img")
    for name in recordings.names(system)
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_as_diffsynth_draws_it(name, recorded_bundle_of):
    recorded = recordings.read(name)
    levels = []
    with Pipeline.open(recorded_bundle_of(recorded.checkpoint, TASKS)) as pipeline:
        (found,) = pipeline(
            **recorded.call, output_type="np",
            callback_on_step_end=lambda pipeline, step, timestep, tensors: levels.append(timestep / 1000),
        ).images  # fmt: skip
    np.testing.assert_allclose([*levels, 0], recorded.arrays["sigmas"], atol=1e-5)
    assert recorded.pixels.std() > 0.05
    assert np.abs(found - recorded.pixels).max() < BOUND


def test_there_are_recordings():
    assert len(NAMES) == 8
