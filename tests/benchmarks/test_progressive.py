from __future__ import annotations

import numpy as np
import progressive
import pytest

from zimgkit.runtime import Pipeline, demo_models


@pytest.mark.parametrize("count", [2, 8, 13])
def test_the_transform_is_that_of_its_definition(count):
    """Each row a cosine of unit length, right-angled to the others."""
    matrix = progressive.dct(count)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(count), atol=1e-6)
    places = np.arange(count) + 0.5
    for frequency in range(1, count):
        wave = np.cos(np.pi * frequency * places / count)
        np.testing.assert_allclose(matrix[frequency], wave / np.linalg.norm(wave), atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (16, 24)])
def test_low_frequencies(size):
    random = np.random.default_rng(0)
    latents = random.standard_normal((1, 4, *size)).astype(np.float32)
    low = progressive.low_frequencies(latents)
    assert low.shape == (1, 4, size[0] // 2, size[1] // 2)
    np.testing.assert_allclose(progressive.with_low_frequencies(latents, low), latents, atol=1e-6)
    other = random.standard_normal(low.shape).astype(np.float32)
    changed = progressive.with_low_frequencies(latents, other)
    np.testing.assert_allclose(progressive.low_frequencies(changed), other, atol=1e-5)
    # What is the same everywhere has twice the strength in a picture of twice the sides; noise has the same.
    np.testing.assert_allclose(progressive.low_frequencies(np.ones((1, 1, *size), np.float32)), 2, atol=1e-5)
    noise = random.standard_normal((1, 4000, *size)).astype(np.float32)
    assert progressive.low_frequencies(noise).std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("model", demo_models.NAMES)
def test_pictures(model):
    call = {"num_inference_steps": 4, "height": 128, "width": 96, "output_type": "np", "seed": 1}
    with Pipeline.open(model, backend="onnxruntime", warn=lambda _: None) as pipeline:
        family = pipeline.session.family
        noise = np.random.default_rng(0).standard_normal((1, *family.noise_shape(128, 96))).astype(np.float32)
        np.testing.assert_array_equal(progressive.to_noise(family, family.from_noise(noise), 128, 96), noise)
        drawn = {
            share: progressive.Progressive(pipeline)("a red circle", share=share, **call).images[0]
            for share in (0.0, 0.5, 1.0)
        }
        (plain,) = pipeline("a red circle", **call).images
    np.testing.assert_array_equal(drawn[0.0], plain)
    for share in (0.5, 1.0):
        assert drawn[share].shape == plain.shape == (128, 96, 3)
        assert np.isfinite(drawn[share]).all() and np.abs(drawn[share] - plain).max() > 0.05
