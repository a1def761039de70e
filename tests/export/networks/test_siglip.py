"""SigLIP2's vision tower against transformers', in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from tests.reference import randomize
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.siglip import SiglipTower, parts, read_config

TINY = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_channels": 3,
    "num_patches": 256, "patch_size": 16,
}  # fmt: skip
SMALL = TINY | {"num_patches": 49, "patch_size": 6, "num_attention_heads": 4, "layer_norm_eps": 1e-5}


def reference(config, seed):
    model = Siglip2VisionModel(Siglip2VisionConfig(**config)).eval()
    randomize(model, seed)
    return model


def interpolation(grid, side):
    """How the learned positions are stretched, of one after the other."""
    single = torch.eye(side * side).reshape(side * side, 1, side, side)
    wide = F.interpolate(single, size=grid, mode="bilinear", align_corners=False, antialias=True)
    return wide.reshape(side * side, -1).T


@pytest.mark.parametrize("config", [TINY, SMALL])
@pytest.mark.parametrize("grid", [(6, 9), (1, 1), (16, 16), (2, 20), (23, 11)])
@torch.inference_mode()
def test_matches_transformers(config, grid):
    model, count, seed = reference(config, sum(grid)), grid[0] * grid[1], sum(grid)
    values = torch.randn(count, 3 * config["patch_size"] ** 2, generator=torch.Generator().manual_seed(seed))
    # The reference pads and masks; ours has the picture's own patches alone.
    padded = torch.cat([values, torch.zeros(7, values.shape[1])])[None]
    mask = (torch.arange(count + 7) < count)[None].int()
    given = {"pixel_values": padded, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([grid])}
    expected = model(**given).last_hidden_state[0, :count].numpy()
    network, state = SiglipTower(read_config(config)).eval(), model.state_dict()
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    assert {name for name in state if not name.startswith("head.")} == set(network.state_dict())
    found = network(values, interpolation(grid, int(config["num_patches"] ** 0.5))).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("change", [{"hidden_size": 15}, {"hidden_act": "relu"}, {"num_patches": 0}])
def test_refuses_what_it_does_not_implement(change):
    with pytest.raises(CheckpointError, match=next(iter(change))):
        parts(TINY | change)
