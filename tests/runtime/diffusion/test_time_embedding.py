"""Time embeddings against diffusers, to the last bit of the angle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder

from zimgkit.runtime.families import qwen_image, z_image

TIMES = np.float32([0, 1, 0.5, 1e-3, *np.random.default_rng(0).random(500)])


def assert_equal(found, expected, scale):
    """Up to a frequency's last bit, in which CPUs differ by how torch computes its exponential there."""
    angles = np.abs(TIMES * np.float32(scale))[:, None]
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert (np.abs(found - expected) <= 1.2e-7 + angles * 2.0**-23).all()
    # And most are the same on any.
    assert (np.abs(found - expected) <= 1.2e-7).mean() > 0.95


def test_qwen_image():
    expected = get_timestep_embedding(torch.from_numpy(TIMES), 256, True, 0, scale=1000)
    assert_equal(qwen_image.time_embedding(TIMES), expected.numpy(), 1000)


@pytest.mark.parametrize("scale", [1000.0, 1.0, 730.5])
def test_z_image(scale):
    expected = TimestepEmbedder.timestep_embedding(torch.from_numpy(TIMES) * scale, 256)
    assert_equal(z_image.time_embedding(TIMES, scale), expected.numpy(), scale)
