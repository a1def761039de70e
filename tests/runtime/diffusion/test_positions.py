from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from diffusers.models.transformers.transformer_z_image import RopeEmbedder
from transformers import Qwen2_5_VLConfig, Qwen3Config
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from zimgkit.engines.errors import CheckpointError, UsageError
from zimgkit.runtime.diffusion import positions as rope

GRIDS = [(1, 1), (4, 6), (6, 4), (3, 5), (64, 64), (83, 83), (58, 104), (104, 58), (1, 7)]
# One unit in the last place of an angle of this size, plus that of the cosine.
EPSILON = 2.0**-23


def assert_tables(tables, cos, sin, highest):
    """Equal, where the two pow functions may have set the angle's last bit differently."""
    assert tables.cos.dtype == tables.sin.dtype == np.float32
    assert tables.cos.shape == tuple(cos.shape)
    tolerance = EPSILON * (1 + highest)
    np.testing.assert_allclose(tables.cos, cos.numpy(), rtol=0, atol=tolerance)
    np.testing.assert_allclose(tables.sin, sin.numpy(), rtol=0, atol=tolerance)
    assert (np.abs(tables.cos - cos.numpy()) > 1.2e-7).mean() < 0.05


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("dims", [[16, 56, 56], [8, 4, 4]])
def test_qwen_image(height, width, dims):
    reference = QwenEmbedRope(theta=10000, axes_dim=dims, scale_rope=True)
    for length in (1, 5, 37, 512, 1024):
        image, text = reference([[(1, height, width)]], max_txt_seq_len=length, device=torch.device("cpu"))
        config = {"axes_dims_rope": dims}
        ours = rope.qwen_image_tables(rope.qwen_image_positions(height, width), config)
        assert_tables(ours, image.real, image.imag, max(height, width) / 2)
        ours = rope.qwen_image_tables(rope.qwen_image_text_positions(length, height, width), config)
        assert_tables(ours, text.real, text.imag, length + max(height, width) / 2)


def test_qwen_image_centre():
    assert rope.qwen_image_positions(83, 64)[[0, -1]].tolist() == [[0, -42, -32], [0, 40, 31]]
    assert rope.qwen_image_text_positions(3, 83, 83).tolist() == [[41] * 3, [42] * 3, [43] * 3]
    assert rope.qwen_image_text_positions(0, 4, 4).shape == (0, 3)


@pytest.fixture(scope="module")
def z_image():
    with torch.device("meta"):
        return ZImageTransformer2DModel(
            all_patch_size=(2,), all_f_patch_size=(1,), dim=48, n_layers=1, n_refiner_layers=1, n_heads=3,
            n_kv_heads=3, cap_feat_dim=16, axes_dims=[8, 4, 4],
        )  # fmt: skip


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("caption", [1, 31, 32, 33, 512])
def test_z_image(z_image, height, width, caption):
    image = torch.zeros(16, 1, 2 * height, 2 * width)
    out = z_image.patchify_and_embed([image], [torch.zeros(caption, 16)], 2, 1)
    (image_ids,), (caption_ids,), (image_mask,), (caption_mask,) = out[3:]
    # The reference appends ids for the pads twice, and cuts what is too many later.
    caption_ids = caption_ids[: len(caption_mask)]
    positions = rope.z_image_positions(height, width, caption)
    caption_positions = rope.z_image_caption_positions(caption)
    np.testing.assert_array_equal(positions, image_ids.numpy())
    np.testing.assert_array_equal(caption_positions, caption_ids.numpy())
    np.testing.assert_array_equal(rope.z_image_pad_mask(height * width), image_mask.numpy())
    np.testing.assert_array_equal(rope.z_image_pad_mask(caption), caption_mask.numpy())
    assert rope.z_image_padded(caption) == len(caption_ids)

    config = {"axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0}
    reference = RopeEmbedder(theta=256.0, axes_dims=config["axes_dims"], axes_lens=config["axes_lens"])
    for ours, ids in ((positions, image_ids), (caption_positions, caption_ids)):
        expected = reference(ids)
        tables = rope.z_image_tables(ours, config)
        # Float64 angles leave nothing to chance.
        np.testing.assert_allclose(tables.cos, expected.real.numpy(), rtol=0, atol=1.2e-7)
        np.testing.assert_allclose(tables.sin, expected.imag.numpy(), rtol=0, atol=1.2e-7)


@pytest.mark.parametrize(
    ("height", "width", "caption", "message"),
    [
        (4, 4, 65, "64 prompt tokens"),
        (65, 4, 8, "1024 pixels of height"),
        (4, 49, 8, "768 pixels of width"),
    ],
)
def test_z_image_limits(height, width, caption, message):
    config = {"axes_dims": [8, 4, 4], "axes_lens": [96, 64, 48], "rope_theta": 256.0}
    rope.z_image_tables(rope.z_image_positions(64, 48, 64), config)
    with pytest.raises(UsageError, match=message):
        rope.z_image_tables(rope.z_image_positions(height, width, caption), config)


QWEN3 = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 4096}


@pytest.mark.parametrize("length", [1, 2, 10, 546, 1058])
@pytest.mark.parametrize(("head_dim", "theta"), [(128, 1e6), (16, 1e4), (64, 5e6)])
def test_qwen3(length, head_dim, theta):
    config = Qwen3Config(**QWEN3, head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta})
    cos, sin = Qwen3RotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    half = head_dim // 2
    for saved in (
        config.to_dict(),
        {"head_dim": head_dim, "rope_theta": theta},
        {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "rope_theta": int(theta), "rope_scaling": None},
    ):
        assert_tables(rope.text_encoder_tables(length, saved), cos[0, :, :half], sin[0, :, :half], length)


@pytest.mark.parametrize("length", [1, 39, 546, 1058])
def test_qwen2_5_vl(length):
    text = {
        "hidden_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    config = Qwen2_5_VLConfig(text_config=text).text_config
    cos, sin = Qwen2_5_VLRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None, None].expand(3, 1, -1))
    for saved in (
        config.to_dict(),
        text | {"rope_theta": 1e6, "rope_parameters": None, "rope_scaling": {"type": "mrope"}},
    ):
        assert_tables(rope.text_encoder_tables(length, saved), cos[0, :, :64], sin[0, :, :64], length)


def test_refuses_other_ropes():
    with pytest.raises(CheckpointError, match="yarn"):
        rope.text_encoder_tables(4, {"head_dim": 8, "rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn"}})
    with pytest.raises(CheckpointError, match="rope_theta"):
        rope.text_encoder_tables(4, {"head_dim": 8})
