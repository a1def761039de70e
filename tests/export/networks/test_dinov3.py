"""DINOv3's vision transformer against transformers', in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from tests.reference import randomize
from zimgkit.export.networks.dinov3 import Config, DinoTower, tables

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224}
BIASES = {"query_bias": True, "key_bias": False, "value_bias": True}


@pytest.mark.parametrize(
    "change",
    [
        {"query_bias": False, "value_bias": False},
        BIASES | {"image_size": 96, "num_register_tokens": 2, "num_attention_heads": 4},
        {"query_bias": True, "key_bias": True, "value_bias": True, "patch_size": 14, "image_size": 70},
    ],
)
@torch.inference_mode()
def test_matches_transformers(change):
    config = TINY | {"num_register_tokens": 4, "patch_size": 16, "key_bias": False} | change
    model = DINOv3ViTModel(
        DINOv3ViTConfig(**config, hidden_act="silu", use_gated_mlp=True, mlp_bias=True, proj_bias=True)
    ).eval()
    randomize(model, len(config))
    side, patch = config["image_size"], config["patch_size"]
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side))
    expected = model(pixel_values=pixels).pooler_output.numpy()
    own = Config(**config)
    network = DinoTower(own).eval()
    state = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    assert set(state) - set(network.state_dict()) <= {"embeddings.mask_token"}
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    rope = {name: torch.from_numpy(table) for name, table in tables(own).items()}
    found = network(F.unfold(pixels, patch, stride=patch)[0].T, **rope).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
