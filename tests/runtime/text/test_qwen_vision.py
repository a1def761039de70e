"""Order, segments and positions against transformers, for pictures of many sizes."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLModel,
    Qwen2_5_VLRotaryEmbedding,
)
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from tests.runtime.rotary import assert_tables
from zimgkit.engines.errors import CheckpointError, UsageError
from zimgkit.export.networks import vision_tower as vision_tower_network
from zimgkit.runtime.diffusion.positions import Rope, text_encoder_rope
from zimgkit.runtime.pictures.patches import Patches
from zimgkit.runtime.text.qwen_vision import (
    VisionTower,
    patch_positions,
    token_positions,
    token_tables,
    tower_inputs,
    vision_tower,
    window_order,
)

SIDES = (2, 4, 6, 8, 10, 16, 18, 20, 36, 74)
"""Of grids, in patches: less than a window (8), whole windows, and between."""
GRIDS = [
    *([(1, rows, columns)] for rows, columns in itertools.product(SIDES, SIDES)),
    [(1, 4, 6), (1, 18, 10)],
    [(1, 28, 28), (1, 20, 36), (1, 22, 32)],
    [(1, 2, 2)] * 3,
]
IMAGE, TEXT = 7, 1


def ids_of(grids: np.ndarray, gaps: list[int]) -> np.ndarray:
    """Token ids of a text with pictures, and so many text tokens before each and at the end."""
    pieces = [[TEXT] * gaps[0]]
    for grid, gap in zip(grids, gaps[1:], strict=True):
        pieces += [[IMAGE] * (grid.prod() // 4), [TEXT] * gap]
    return np.array([*itertools.chain(*pieces)], np.int64)


@pytest.mark.parametrize("window", [112, 56, 336])
def test_windows(window: int) -> None:
    for grid in GRIDS:
        grids = np.array(grid, np.int64)
        order, boundaries = get_vision_window_index(torch.from_numpy(grids), 2, window, 14)
        ours, starts = window_order(grids, 2, window // 28)
        assert ours.dtype == starts.dtype == np.int64
        np.testing.assert_array_equal(ours, order.numpy())
        np.testing.assert_array_equal(starts, boundaries.numpy())


def test_positions_of_patches() -> None:
    for grid in GRIDS:
        grids = np.array(grid, np.int64)
        np.testing.assert_array_equal(patch_positions(grids, 2), get_vision_position_ids(torch.from_numpy(grids), 2))


@pytest.mark.parametrize("grid", [(10, 18), (2, 2), (36, 20)])
def test_the_tower_gives_its_rows_in_order(grid: tuple[int, int]) -> None:
    """The network that bundles have, on these inputs, against transformers' on the picture as it is."""
    torch.manual_seed(0)
    sizes = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 24}
    config = Qwen2_5_VLConfig(vision_config=sizes | {"fullatt_block_indexes": [1]})
    theirs = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config).eval()
    grids = np.array([(1, *grid)], np.int64)
    values = np.random.default_rng(1).normal(size=(int(grids.prod()), 1176)).astype(np.float32)
    parsed = config.to_dict()
    (part,) = vision_tower_network.parts(parsed).values()
    ours = vision_tower_network.VisionTower(vision_tower_network.read_config(parsed)).eval()
    state = {f"visual.{name}": value for name, value in theirs.state_dict().items()}
    for name, transform in part.transforms.items():
        state[name] = torch.from_numpy(transform(state[name].numpy()))
    ours.load_state_dict(state)
    inputs = tower_inputs(Patches(values, grids), vision_tower(parsed))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(values), torch.from_numpy(grids)).pooler_output.numpy()
        found = ours(**{name: torch.from_numpy(value) for name, value in inputs.feeds.items()}).numpy()
    assert list(inputs.feeds) == [given.name for given in part.inputs]
    np.testing.assert_allclose(found[inputs.inverse], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gaps", [0, 1, 5], ids="gap {}".format)
def test_positions_of_tokens(gaps: int) -> None:
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2))
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = partial(Qwen2_5_VLModel.get_vision_position_ids, model)
    for grid in GRIDS[::3] + GRIDS[-3:]:
        if len(grid) > 1 and not gaps:
            continue  # Pictures with nothing between them would be one to the reference.
        grids = np.array(grid, np.int64)
        ids = ids_of(grids, [70, *[gaps] * len(grids)])
        types = torch.from_numpy((ids == IMAGE).astype(np.int32))[None]
        theirs, _ = Qwen2_5_VLModel.get_rope_index(
            model, torch.from_numpy(ids)[None], types, image_grid_thw=torch.from_numpy(grids)
        )
        ours = token_positions(ids, IMAGE, grids, 2)
        assert ours.dtype == np.int64
        np.testing.assert_array_equal(ours, theirs[:, 0].numpy())


def test_text_alone_counts_on() -> None:
    ours = token_positions(np.ones(9, np.int64), IMAGE, np.zeros((0, 3), np.int64), 2)
    np.testing.assert_array_equal(ours, np.tile(np.arange(9), (3, 1)))


@pytest.mark.parametrize(
    ("ids", "grids"),
    [
        ([TEXT] * 8, [(1, 4, 4)]),
        ([TEXT, *[IMAGE] * 3], [(1, 4, 4)]),
        ([TEXT, *[IMAGE] * 5], [(1, 4, 4)]),
        ([*[IMAGE] * 2, TEXT, *[IMAGE] * 2], [(1, 4, 4)]),
        ([IMAGE], []),
        ([], [(1, 2, 2)]),
    ],
)
def test_refuses_tokens_of_other_pictures(ids: list[int], grids: list[tuple[int, int, int]]) -> None:
    with pytest.raises(UsageError, match="tokens for pictures"):
        token_positions(np.array(ids, np.int64), IMAGE, np.array(grids, np.int64).reshape(-1, 3), 2)


@pytest.mark.parametrize(
    ("dim", "sections", "theta"), [(128, [16, 24, 24], 1e6), (8, [1, 1, 2], 1e6), (32, [4, 6, 6], 1e4)]
)
def test_tables_of_tokens(dim: int, sections: list[int], theta: float) -> None:
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": sections}
    text = {"hidden_size": 4 * dim, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    config = Qwen2_5_VLConfig(text_config=text).text_config
    grids = np.array([(1, 74, 36), (1, 4, 6)], np.int64)
    positions = token_positions(ids_of(grids, [64, 3, 80]), IMAGE, grids, 2)
    cos, sin = Qwen2_5_VLRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(positions)[:, None])
    ours = token_tables(positions, text_encoder_rope(config.to_dict()))
    assert_tables(ours, cos[0, :, : dim // 2], sin[0, :, : dim // 2], positions.max())


def test_refuses_configs_that_do_not_fit() -> None:
    with pytest.raises(CheckpointError, match="mrope_section"):
        token_tables(np.zeros((3, 1), np.int64), Rope(64, 1e6))
    with pytest.raises(CheckpointError, match="vision_config is missing"):
        vision_tower({})
    for wrong in ({"window_size": 16}, {"num_heads": 7}):
        with pytest.raises(CheckpointError, match="do not fit together"):
            vision_tower({"vision_config": wrong})
    assert vision_tower({"vision_config": {}}) == VisionTower()
