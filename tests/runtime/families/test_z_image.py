"""Positions and pads against diffusers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import RopeEmbedder

from tests.runtime.rotary import GRIDS
from zimgkit.engines.errors import UsageError
from zimgkit.runtime.families.z_image import (
    Transformer,
    caption_positions,
    image_positions,
    pad_mask,
    padded_length,
    tables,
)


@pytest.fixture(scope="module")
def z_image():
    with torch.device("meta"):
        return ZImageTransformer2DModel(
            all_patch_size=(2,), all_f_patch_size=(1,), dim=48, n_layers=1, n_refiner_layers=1, n_heads=3,
            n_kv_heads=3, cap_feat_dim=16, axes_dims=[8, 4, 4],
        )  # fmt: skip


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("caption", [1, 31, 32, 33, 512])
def test_positions_and_tables(z_image, height, width, caption):
    image = torch.zeros(16, 1, 2 * height, 2 * width)
    out = z_image.patchify_and_embed([image], [torch.zeros(caption, 16)], 2, 1)
    (image_ids,), (caption_ids,), (image_mask,), (caption_mask,) = out[3:]
    # The reference appends ids for the pads twice, and cuts what is too many later.
    caption_ids = caption_ids[: len(caption_mask)]
    positions = image_positions(height, width, caption)
    of_caption = caption_positions(caption)
    np.testing.assert_array_equal(positions, image_ids.numpy())
    np.testing.assert_array_equal(of_caption, caption_ids.numpy())
    np.testing.assert_array_equal(pad_mask(height * width), image_mask.numpy())
    np.testing.assert_array_equal(pad_mask(caption), caption_mask.numpy())
    assert padded_length(caption) == len(caption_ids)

    config = Transformer(16, (32, 48, 48), (1536, 512, 512), rope_theta=256.0, t_scale=1000.0)
    reference = RopeEmbedder(theta=256.0, axes_dims=config.axes_dims, axes_lens=config.axes_lens)
    for ours, ids in ((positions, image_ids), (of_caption, caption_ids)):
        expected = reference(ids)
        found = tables(ours, config)
        # Float64 angles leave nothing to chance.
        np.testing.assert_allclose(found.cos, expected.real.numpy(), rtol=0, atol=1.2e-7)
        np.testing.assert_allclose(found.sin, expected.imag.numpy(), rtol=0, atol=1.2e-7)


@pytest.mark.parametrize(
    ("height", "width", "caption", "message"),
    [
        (4, 4, 65, "64 prompt tokens"),
        (65, 4, 8, "1024 pixels of height"),
        (4, 49, 8, "768 pixels of width"),
    ],
)
def test_limits(height, width, caption, message):
    config = Transformer(16, (8, 4, 4), (96, 64, 48), rope_theta=256.0, t_scale=1000.0)
    tables(image_positions(64, 48, 64), config)
    with pytest.raises(UsageError, match=message):
        tables(image_positions(height, width, caption), config)
