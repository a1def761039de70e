"""Pictures whose first steps are taken at half the size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zimgkit.engines.errors import CancelledError, UsageError
from zimgkit.runtime import Pipeline, demo_models
from zimgkit.runtime.diffusion.progressive import levels_at, low_frequencies, with_low_frequencies
from zimgkit.runtime.job import Schedule
from zimgkit.runtime.recording import record
from zimgkit.runtime.request import check

CALL: dict[str, Any] = {
    "prompt": "a", "height": 64, "width": 96, "num_inference_steps": 4, "negative_prompt": "b", "cfg_scale": 3.0,
    "seed": 1, "output_type": "np",
}  # fmt: skip


@pytest.fixture(scope="module", params=demo_models.NAMES)
def pipeline(request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    with Pipeline.open(request.param, backend="onnxruntime") as opened:
        yield opened


def ask(pipeline: Pipeline, **call: Any) -> Any:
    return check(pipeline.bundle.manifest, pipeline.session.family, **(CALL | call))


def test_it_is_two_runs(pipeline: Pipeline) -> None:
    """Steps of a picture of half the size, whose latents become those of the whole's next step."""
    session, family = pipeline.session, pipeline.session.family
    found = pipeline(**CALL, progressive=0.5).images[0]
    (whole,) = session.begin(ask(pipeline))
    (half,) = session.begin(ask(pipeline, height=32, width=48))
    noise, sigmas = family.to_noise(whole.latents, 64, 96), whole.schedule.sigmas
    np.testing.assert_array_equal(family.from_noise(noise), whole.latents)
    levels = levels_at(sigmas[:3], 2.0)
    half.schedule = Schedule(np.append(levels, np.float32(0)), family.schedule_inputs(pipeline.bundle, levels))
    half.latents = family.from_noise(low_frequencies(noise, 4, 6))
    for _ in range(2):
        session.step([half])
    low = sigmas[2] / levels[2] * family.to_noise(half.latents, 32, 48)
    whole.latents, whole.step = family.from_noise(with_low_frequencies(sigmas[2] * noise, low)), 2
    for _ in range(2):
        session.step([whole])
    np.testing.assert_allclose(found, session.finish(whole), atol=1e-5)
    assert np.abs(found - pipeline(**CALL).images[0]).max() > 1e-3


def test_sizes_while_it_grows(pipeline: Pipeline) -> None:
    """Odd numbers of tokens, several pictures at once, and what callbacks and previews see."""
    call = {"prompt": ["a", "c"], "num_images_per_prompt": 2, "height": 80, "width": 48}
    session, seen = pipeline.session, []
    jobs = session.begin(ask(pipeline, progressive=0.6, **call))
    while not jobs[0].is_denoised:
        session.step(jobs)
        assert jobs[0].denoised is not None
        seen.append((jobs[0].size, session.decode(jobs[0].denoised, *jobs[0].size).shape[1:3]))
    assert seen == [((48, 32), (48, 32))] * 2 + [((80, 48), (80, 48))] * 2
    pictures = np.stack([session.finish(job) for job in jobs])
    shapes = []
    images = pipeline(
        **(CALL | call), progressive=0.6, callback_on_step_end=lambda *args: shapes.append(args[3]["latents"].shape)
    ).images
    np.testing.assert_array_equal(images, pictures)
    assert len(set(shapes)) == 2


def test_what_a_cache_keeps_ends_with_the_smaller_size(pipeline: Pipeline) -> None:
    """The first step of the whole size is full, whatever the mask says of it."""
    masks = ("1111", "1101", "1011", "1001")
    full, asked, late, both = (pipeline(**CALL, progressive=0.5, cache=mask).images for mask in masks)
    np.testing.assert_array_equal(full, pipeline(**CALL, progressive=0.5).images)
    np.testing.assert_array_equal(asked, full)
    np.testing.assert_array_equal(late, both)
    assert not np.array_equal(late, full)


def test_the_last_step_has_the_whole_size(pipeline: Pipeline) -> None:
    assert pipeline.session.begin(ask(pipeline, progressive=1.0))[0].growth.step == 3  # type: ignore[union-attr]
    one = {"num_inference_steps": 1, "output_type": "np"}
    assert np.array_equal(pipeline(**(CALL | one), progressive=1.0).images, pipeline(**(CALL | one)).images)


def test_it_is_cancelled_while_it_is_small(pipeline: Pipeline) -> None:
    (job,) = pipeline.session.begin(ask(pipeline, progressive=0.5))
    pipeline.session.step([job])
    job.cancel()
    assert job.growth is job.positive is job.negative is None
    with pytest.raises(CancelledError):
        pipeline.session.step([job])


def test_what_is_refused_and_recorded(pipeline: Pipeline) -> None:
    request = ask(pipeline, progressive=0.5)
    assert record(pipeline.session, request, 0, 1).call()["progressive"] == 0.5
    for more in ({"progressive": 1.5}, {"progressive": 0.5, "image": Image.new("RGB", (64, 64))}):
        with pytest.raises(UsageError, match=r"progressive is (1.5; give a number from 0 to 1|for pictures that are)"):
            ask(pipeline, **more)
