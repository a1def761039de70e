"""Pictures as input in DiffSynth's words: against what DiffSynth gave (``tests/references``)."""

from __future__ import annotations

import numpy as np
import pytest

from tests.references import recordings
from zimgkit.runtime import Pipeline
from zimgkit.runtime.request import check

BOUND = 1e-4
"""On pixels from 0 to 1."""
TASKS = {
    "qwen-image-img2img": ("image-to-image", "inpaint"),
    "qwen-image-inpaint": ("image-to-image", "inpaint"),
    "z-image-img2img": ("image-to-image", "inpaint"),
    "qwen-image-in-context": ("context",),
    "qwen-image-eligen": ("regions",),
    "qwen-image-edit-lowres-fix": (),
    "qwen-image-control": (),
    "qwen-image-edit-img2img": (),
    "qwen-image-edit-eligen": ("regions",),
    "qwen-image-context-eligen": ("context", "regions"),
}
NAMES = [name for system in TASKS for name in recordings.names(system)]


@pytest.fixture(params=NAMES)
def recorded(request):
    return request.param, recordings.read(request.param)


@pytest.fixture
def pipeline(recorded, recorded_bundle_of):
    name, recording = recorded
    tasks = TASKS[name.partition(".")[0]]
    with Pipeline.open(recorded_bundle_of(recording.checkpoint, tasks, recording.lora)) as opened:
        yield opened


@pytest.mark.filterwarnings("ignore")
def test_as_diffsynth_draws_it(recorded, pipeline):
    _, recording = recorded
    levels = []
    (found,) = pipeline(
        **recording.call, output_type="np",
        callback_on_step_end=lambda pipeline, step, timestep, tensors: levels.append(timestep / 1000),
    ).images  # fmt: skip
    np.testing.assert_allclose([*levels, 0], recording.arrays["sigmas"], atol=1e-5)
    assert recording.pixels.std() > 0.05
    assert np.abs(found - recording.pixels).max() < BOUND


def test_what_the_denoiser_takes_in(recorded, pipeline):
    """Pictures of thousands of tokens hardly show the words: the tensors are compared too."""
    _, recording = recorded
    if "rotary_text" not in recording.arrays:
        pytest.skip("nothing stands beside the picture")
    session, seen = pipeline.session, recording.arrays
    request = check(pipeline.bundle.manifest, session.family, **recording.call)
    (job,) = session.begin(request)
    try:
        for prefix, conditions in (("", job.positive), ("negative.", job.negative)):
            if f"{prefix}rotary_text" not in seen:
                continue
            given = conditions._make()
            rotary = np.concatenate([seen[f"{prefix}rotary_text"], seen["rotary_image"]])
            np.testing.assert_allclose(given["cos"], rotary[..., 0], atol=2e-5)
            np.testing.assert_allclose(given["sin"], rotary[..., 1], atol=2e-5)
            if f"{prefix}attention_mask" in seen:
                np.testing.assert_array_equal(given["mask"], seen[f"{prefix}attention_mask"].astype(bool))
        tokens = [job.latents.reshape(-1, seen["hidden_states"].shape[1])]
        tokens += [given[0] for given in [job.positive._make().get("condition")] if given is not None]
        np.testing.assert_allclose(np.concatenate(tokens), seen["hidden_states"], atol=1e-4)
    finally:
        job.release()
    read, of_regions = session.conditioner._read, request.inputs.eligen_entity_prompts
    ((whole,),) = read(request, request.prompts, session.conditioner._references(request)).values()
    np.testing.assert_allclose(whole, seen["prompt_embeds"], atol=1e-4)
    rows = read(request, of_regions, None, session.family.TEXT)
    for index, text in enumerate(of_regions):
        np.testing.assert_allclose(rows[text][0], seen[f"entity_prompt_embeds.{index}"], atol=1e-4)


def test_there_are_recordings():
    assert len(NAMES) == 26
