"""SigLIP2 of one size, with its pooling head, against transformers', in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from tests.reference import randomize
from zimgkit.export.networks.siglip import Config
from zimgkit.export.networks.siglip_pooled import PooledSiglipTower

TINY = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16,
}  # fmt: skip


@pytest.mark.parametrize(("change", "side"), [({}, 48), ({"num_attention_heads": 4, "patch_size": 14}, 70)])
@torch.inference_mode()
def test_matches_transformers(change, side):
    config = TINY | change
    model = SiglipVisionModel(SiglipVisionConfig(**config, image_size=side, hidden_act="gelu_pytorch_tanh")).eval()
    randomize(model, side)
    patch = config["patch_size"]
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side))
    expected = model(pixel_values=pixels).pooler_output.numpy()
    network = PooledSiglipTower(Config(**config, num_patches=(side // patch) ** 2)).eval()
    state = {name.removeprefix("vision_model."): value for name, value in model.state_dict().items()}
    network.load_state_dict({name: value for name, value in state.items() if "position_ids" not in name})
    found = network(F.unfold(pixels, patch, stride=patch)[0].T).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
