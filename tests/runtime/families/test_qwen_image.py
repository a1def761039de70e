"""Positions against diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

from tests.runtime.rotary import GRIDS, assert_tables
from zimgkit.runtime.families.qwen_image import Transformer, image_positions, tables, text_positions


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("dims", [[16, 56, 56], [8, 4, 4]])
def test_tables(height, width, dims):
    reference = QwenEmbedRope(theta=10000, axes_dim=dims, scale_rope=True)
    for length in (1, 5, 37, 512, 1024):
        image, text = reference([[(1, height, width)]], max_txt_seq_len=length, device=torch.device("cpu"))
        config = Transformer(in_channels=64, axes_dims_rope=tuple(dims))
        ours = tables(image_positions(height, width), config)
        assert_tables(ours, image.real, image.imag, max(height, width) / 2)
        ours = tables(text_positions(length, [(height, width)]), config)
        assert_tables(ours, text.real, text.imag, length + max(height, width) / 2)


def test_the_origin_is_in_the_middle():
    assert image_positions(83, 64)[[0, -1]].tolist() == [[0, -42, -32], [0, 40, 31]]
    assert text_positions(3, [(83, 83)]).tolist() == [[41] * 3, [42] * 3, [43] * 3]
    assert text_positions(0, [(4, 4)]).shape == (0, 3)
