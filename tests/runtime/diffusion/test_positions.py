from __future__ import annotations

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen3Config
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from tests.runtime.rotary import assert_tables
from zimgkit.engines.errors import CheckpointError
from zimgkit.runtime.diffusion.positions import text_encoder_rope, text_encoder_tables

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
        assert_tables(text_encoder_tables(length, text_encoder_rope(saved)), cos[0, :, :half], sin[0, :, :half], length)


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
        assert_tables(text_encoder_tables(length, text_encoder_rope(saved)), cos[0, :, :64], sin[0, :, :64], length)


def test_refuses_other_ropes():
    with pytest.raises(CheckpointError, match="yarn"):
        text_encoder_rope({"head_dim": 8, "rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn"}})
    with pytest.raises(CheckpointError, match="rope_theta"):
        text_encoder_rope({"head_dim": 8})
