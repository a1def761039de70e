"""The vision tower against transformers', in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from tests.reference import randomize
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.vision_tower import VisionTower, parts, read_config

TINY = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 24, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [1],
}  # fmt: skip
SMALL = TINY | {
    "patch_size": 6, "window_size": 24, "num_heads": 4, "hidden_size": 80, "depth": 2, "fullatt_block_indexes": [],
}  # fmt: skip
GRIDS = [(8, 8), (2, 2), (16, 24), (10, 8), (14, 22), (8, 26), (4, 38), (28, 28)]
"""Rows and columns of patches: whole windows, one that is not full, edges that are not full, one of them."""


def of_config(config):
    return {"vision_config": config}


def reference(config, seed):
    parsed = Qwen2_5_VLConfig(vision_config=config).vision_config
    parsed._attn_implementation = "sdpa"
    model = Qwen2_5_VisionTransformerPretrainedModel(parsed).eval()
    randomize(model, seed)
    return model


def inputs_of(model, config, pixel_values, grid):
    """What the network takes, from the reference's own functions for positions and windows."""
    found, shape = read_config(of_config(config)), torch.tensor([[1, *grid]])
    index, bounds = get_vision_window_index(
        shape, config["spatial_merge_size"], config["window_size"], config["patch_size"]
    )
    cos, sin = model.rotary_pos_emb(pixel_values, get_vision_position_ids(shape, config["spatial_merge_size"]))
    order = (index[:, None] * found.merged + torch.arange(found.merged)).flatten()
    half, starts = cos.shape[1] // 2, bounds[:-1, None].long()
    slots = torch.arange(found.window_patches)
    mask = slots < (bounds[1:] - bounds[:-1])[:, None]
    taken = torch.where(mask, starts + slots, torch.tensor(0))
    feeds = {
        "pixel_values": pixel_values[order], "cos": cos[order, :half], "sin": sin[order, :half], "window_index": taken,
        "window_mask": mask, "patch_places": mask.flatten().nonzero()[:, 0],
    }  # fmt: skip
    return feeds, np.argsort(index.numpy())


def pixels(config, grid, seed):
    found = read_config(of_config(config))
    return torch.randn(grid[0] * grid[1], found.patch_values, generator=torch.Generator().manual_seed(seed))


def close(found, expected):
    return found.shape == expected.shape and np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("config", [TINY, SMALL])
@pytest.mark.parametrize("grid", GRIDS)
@torch.inference_mode()
def test_matches_transformers(config, grid):
    model = reference(config, sum(grid))
    values = pixels(config, grid, sum(grid))
    expected = model(values, grid_thw=torch.tensor([[1, *grid]])).pooler_output.numpy()
    network = VisionTower(read_config(of_config(config)))
    state = {f"visual.{name}": value for name, value in model.state_dict().items()}
    network.load_state_dict(state, strict=True)
    feeds, order = inputs_of(model, config, values, grid)
    found = network(*feeds.values()).numpy()
    assert close(found[order], expected)


def test_takes_all_that_a_checkpoint_has():
    (part,) = parts(of_config(TINY)).values()
    whole = {f"visual.{name}": tuple(value.shape) for name, value in reference(TINY, 0).state_dict().items()}
    assert part.stored_shapes() == whole


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has no vision_config"),
        (of_config({"depth": 2}), "hidden_size"),
        (of_config(TINY | {"num_heads": 3}), "make no even heads"),
        (of_config(TINY | {"window_size": 20}), "window_size below one merged patch"),
        (of_config(TINY | {"hidden_act": "gelu"}), "hidden_act"),
        (of_config(TINY | {"fullatt_block_indexes": [-1]}), "fullatt_block_indexes"),
    ],
)
def test_refuses_what_it_does_not_implement(config, message):
    with pytest.raises(CheckpointError, match=message):
        read_config(config)
