"""What is kept is what the cases say; that it is what DiffSynth-Studio gives, ``make references`` says."""

from __future__ import annotations

import numpy as np
import pytest

from tests.references import recordings
from tests.references.cases import CASES
from tests.references.checkpoints import CHECKPOINTS


def test_every_case_is_recorded_and_nothing_else():
    assert sorted(CASES) == sorted(file.stem for file in recordings.FOLDER.iterdir())


@pytest.mark.parametrize("name", CASES)
def test_the_call_of_a_case(name):
    case, recorded = CASES[name], recordings.read(name)
    assert (recorded.checkpoint, recorded.lora, recorded.call) == (case.checkpoint, case.lora, case.said)
    assert recorded.checkpoint in CHECKPOINTS
    assert recorded.pixels.shape == (case.call["height"], case.call["width"], 3)
    assert len(recorded.arrays["sigmas"]) == case.call["num_inference_steps"] + 1
    assert all(np.isfinite(array).all() for array in recorded.arrays.values())
    assert ("velocity" in recorded.arrays) == case.tensors


def test_they_are_small():
    assert sum(file.stat().st_size for file in recordings.FOLDER.iterdir()) < 4_000_000
