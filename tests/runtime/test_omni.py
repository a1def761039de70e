"""Drawing from pictures and text with Z-Image-Omni, against diffusers with the same weights, prompt, pictures, seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import reference
from tests.runtime.test_from_pictures import picture
from zimgkit.runtime import Pipeline

BOUND = 1e-4
"""On pixels from 0 to 1."""


@pytest.fixture(scope="module")
def ours(bundle_of):
    with Pipeline.open(bundle_of("z-image-omni")) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def theirs():
    return reference.FAMILIES["z-image-omni"](0)


LONG = "make the cup on the table blue, and the table of old wood with rings of many years in it"
CASES = [
    # sizes of the pictures, what is drawn (width, height; None as it comes), prompt, steps, guidance scale, seed
    ([], (64, 64), "a cup", 2, 0.0, 0),
    ([], (96, 48), LONG, 2, 3.0, 1),
    ([(64, 64)], (64, 64), "make the cup blue", 2, 0.0, 2),
    ([(150, 100)], (96, 64), LONG, 3, 4.0, 3),
    ([(97, 71), (64, 160)], (48, 80), "both", 2, 2.5, 4),
    ([(64, 200), (101, 77)], None, "", 2, 1.0, 5),
]


@pytest.mark.parametrize(("sizes", "size", "prompt", "steps", "scale", "seed"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_same_picture(ours, theirs, sizes, size, prompt, steps, scale, seed):
    images = [picture(*each, seed + index) for index, each in enumerate(sizes)]
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": scale, "image": images or None}
    call |= {"negative_prompt": "blurry, and too dark for anything to be seen" if scale > 2 else None}
    call |= dict(zip(("width", "height"), size, strict=True)) if size else {}
    expected = reference.draw(theirs, prompt, seed=seed, **call)
    found = ours(prompt, seed=seed, output_type="np", **call).images
    assert found.shape == expected.shape
    assert expected.std() > 0.05
    assert np.abs(found - expected).max() < BOUND
