"""Pictures drawn with a Fun ControlNet, against what DiffSynth gave (``tests/references``)."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.references import recordings
from zimgkit.engines.errors import UsageError
from zimgkit.runtime import Pipeline
from zimgkit.runtime.diffusion.latents import unpack
from zimgkit.runtime.families.base import ControlPictures
from zimgkit.runtime.families.z_image import LAYOUT
from zimgkit.runtime.families.z_image_control import condition
from zimgkit.runtime.request import check

BOUND = 1e-4
"""On pixels from 0 to 1."""
NAMES = recordings.names("z-image-control")


@pytest.fixture(scope="module")
def pipeline(recorded_bundle_of):
    with Pipeline.open(recorded_bundle_of("z-image-control"), backend="onnxruntime") as opened:
        yield opened


@pytest.fixture(scope="module")
def call():
    return {**recordings.read("z-image-control.guided").call, "output_type": "np"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_as_diffsynth_draws_it(pipeline, name):
    recorded = recordings.read(name)
    (found,) = pipeline(**recorded.call, output_type="np").images
    assert recorded.pixels.std() > 0.05
    assert np.abs(found - recorded.pixels).max() < BOUND


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_the_first_step(pipeline, name):
    recorded, session = recordings.read(name), pipeline.session
    height, width = recorded.call["height"] // 8, recorded.call["width"] // 8
    tokens = height * width // 4
    (job,) = session.begin(check(pipeline.bundle.manifest, session.family, **recorded.call))
    try:
        given = {**job.positive._make(), **job.controls.conditions._make(), **job.controls.at(0, len(job.schedule))}
        given |= {**job.schedule.inputs(0), **session.family.denoiser_inputs(job.latents)}
        with session.engines.engine("denoiser.control.union") as engine:
            velocity = session.family.velocity(engine.run(given)["velocity"], job.latents)
    finally:
        job.release()
    channels = unpack(given["condition.union"][:, :tokens], LAYOUT, height, width)
    # The grey that stands for no picture leaves the encoder's group norms nothing but rounding.
    assert error(channels, recorded.arrays["condition"]) < (1e-5 if channels[:, 16].any() else 1e-4)
    assert error(velocity, recorded.arrays["velocity"]) < 1e-5


def error(found, expected):
    """Relative, of the whole."""
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_scale_0_is_the_plain_denoiser(recorded_bundle_of, call):
    with Pipeline.open(recorded_bundle_of("z-image-control"), backend="onnxruntime") as fresh:
        (plain,) = fresh(**{key: value for key, value in call.items() if key != "controlnet_inputs"}).images
        (found,) = fresh(**call | {"controlnet_inputs": [{**call["controlnet_inputs"][0], "scale": 0}]}).images
        np.testing.assert_array_equal(found, plain)
        assert "denoiser.control.union" not in fresh.session.engines.opened


def test_a_control_picture_of_another_size_is_resized(pipeline, call):
    size = (call["width"], call["height"])
    large = call["controlnet_inputs"][0]["image"].resize((90, 130))
    plain = {key: value for key, value in call.items() if key != "controlnet_inputs"}
    found, expected = (
        pipeline(**plain, control_image=picture, controlnet_conditioning_scale=0.8).images[0]
        for picture in (large, large.resize(size, Image.Resampling.LANCZOS))
    )
    np.testing.assert_array_equal(found, expected)


PICTURE, MASK = Image.new("RGB", (64, 48), "teal"), Image.new("L", (64, 48), 255)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inpaint_mask": MASK}, "union is given a mask and no inpaint_image"),
        ({"image": PICTURE, "inpaint_image": PICTURE}, "union is given an inpaint_image and no mask"),
        ({"scale": 0.5}, "union is given no picture"),
        ({"image": PICTURE.resize((48, 64))}, "the image of the ControlNet union is 48x64, and what is drawn 64x48"),
        (
            {"inpaint_image": PICTURE.resize((32, 32)), "inpaint_mask": MASK},
            "the inpaint_image of the ControlNet union is 32x32",
        ),
        ({"image": PICTURE, "controlnet_id": 1}, "controlnet_id is 1"),
    ],
)
def test_what_it_is_not_given(pipeline, call, given, message):
    with pytest.raises(UsageError, match=message):
        pipeline(**call | {"controlnet_inputs": [given]})


def test_a_mask_of_another_size_is_resized():
    seen = []

    def encode(pixels):
        seen.append(pixels)
        return np.zeros((1, 16, 6, 8), np.float32)

    given = ControlPictures(mask=MASK.convert("RGB").resize((10, 20)), inpaint_image=PICTURE)
    found = condition(given, encode, (16, 6, 8), inpaints=True)
    assert found.shape == (1, 33, 6, 8)
    assert (found[:, :16] == -1).all()
    assert not seen[0].any()
    assert not found[:, 16].any()


def test_nets_that_do_not_inpaint_see_the_control_picture_alone():
    found = condition(ControlPictures(PICTURE), lambda pixels: pixels[:, :, ::8, ::8], (3, 6, 8), inpaints=False)
    assert found.shape == (1, 3, 6, 8)
