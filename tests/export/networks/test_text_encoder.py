"""The text encoders against transformers' whole models: which hidden state, which layers, padding or none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3Config, Qwen3Model

from tests.reference import randomize
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.text_encoder import PicturesTextEncoder, TextEncoder, edit_parts, text_config, text_part
from zimgkit.runtime.diffusion.positions import text_encoder_rope, text_encoder_tables

QWEN3 = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
QWEN2 = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "max_position_embeddings": 2048, "bos_token_id": None, "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14,
    "fullatt_block_indexes": [0],
}  # fmt: skip


def encode(config, state, ids):
    encoder = TextEncoder(config).eval()
    encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
    cos, sin = text_encoder_tables(ids.shape[1], text_encoder_rope(text_part(config)))
    return encoder(ids, torch.from_numpy(cos), torch.from_numpy(sin)).numpy()


def padded(ids, length):
    """As the pipelines feed the encoder: padding on the right, masked."""
    pad = length - ids.shape[1]
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, pad, dtype=torch.int64)], dim=1)
    return torch.cat([ids, torch.zeros(1, pad, dtype=torch.int64)], dim=1), mask


@pytest.mark.parametrize("tokens", [2, 8, 41, 200])
@pytest.mark.parametrize("change", [{}, {"num_key_value_heads": 4, "num_hidden_layers": 2, "rms_norm_eps": 1e-5}])
@torch.inference_mode()
def test_qwen3_second_to_last_hidden_state(tokens, change):
    config = Qwen3Config(**(QWEN3 | change))
    reference = Qwen3Model(config).eval()
    randomize(reference, tokens)
    ids = torch.randint(0, 300, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    all_ids, mask = padded(ids, 256)
    expected = reference(input_ids=all_ids, attention_mask=mask.bool(), output_hidden_states=True).hidden_states[-2]
    expected = expected[:, :tokens].numpy()
    found = encode(config.to_dict(), reference.state_dict(), ids)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("tokens", [5, 39, 150])
@torch.inference_mode()
def test_qwen2_5_vl_last_hidden_state(tokens):
    config = Qwen2_5_VLConfig(text_config=QWEN2, vision_config=VISION, tie_word_embeddings=False)
    reference = Qwen2_5_VLForConditionalGeneration(config).eval()
    randomize(reference, tokens)
    ids = torch.randint(0, 300, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    all_ids, mask = padded(ids, 180)
    expected = reference(input_ids=all_ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    expected = expected[:, :tokens].numpy()
    found = encode(config.to_dict(), reference.model.language_model.state_dict(), ids)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("prompt", "grids"),
    [("ab<>cdefgh", [(4, 6)]), ("<>", [(2, 2)]), ("ab<>c<>defghijk<>", [(8, 4), (2, 10), (6, 6)])],
)
@torch.inference_mode()
def test_rows_of_pictures(prompt, grids):
    """The whole model reads pictures and a prompt; ours gets what its tower made of them, and its positions."""
    image, start, end = 297, 298, 299
    ids, pictures = [], iter(grids)
    for char in prompt:
        inside = [image] * (math.prod(next(pictures)) // 4) if char == ">" else []
        ids += [start] if char == "<" else [*inside, end] if char == ">" else [ord(char)]
    config = Qwen2_5_VLConfig(
        text_config=QWEN2, vision_config=VISION, tie_word_embeddings=False, image_token_id=image,
        vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    reference = Qwen2_5_VLForConditionalGeneration(config).eval()
    randomize(reference, len(ids))
    input_ids, grid = torch.tensor([ids]), torch.tensor([[1, *sizes] for sizes in grids])
    is_picture = input_ids == image
    values = torch.randn(4 * int(is_picture.sum()), 1176, generator=torch.Generator().manual_seed(1))
    expected = reference(
        input_ids=input_ids, pixel_values=values, image_grid_thw=grid, mm_token_type_ids=is_picture.int(),
        output_hidden_states=True,
    ).hidden_states[-1].numpy()  # fmt: skip

    model = reference.model
    positions, _ = model.get_rope_index(input_ids, is_picture.int(), grid)
    cos, sin = (table[0, :, :4] for table in model.language_model.rotary_emb(values, positions))
    rows = model.visual(values, grid_thw=grid).pooler_output
    index = torch.where(is_picture[0], len(ids) + is_picture[0].cumsum(0) - 1, torch.arange(len(ids)))
    encoder = PicturesTextEncoder(config.to_dict()).eval()
    encoder.load_state_dict(model.language_model.state_dict())
    found = encoder(input_ids, cos, sin, rows, index).numpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    # Without its pictures a prompt is another.
    words = TextEncoder(config.to_dict()).eval()
    words.load_state_dict(model.language_model.state_dict())
    assert np.abs(words(input_ids, cos, sin).numpy() - expected).max() > 1e-2


def test_a_tower_that_does_not_fit():
    config = Qwen2_5_VLConfig(text_config=QWEN2, vision_config=VISION | {"out_hidden_size": 48}).to_dict()
    with pytest.raises(CheckpointError, match="out_hidden_size is not the text model's hidden_size"):
        edit_parts(config)
    with pytest.raises(CheckpointError, match="no vision_config"):
        edit_parts(QWEN3 | {"model_type": "qwen3"})


def test_flat_config_of_older_files():
    flat = QWEN2 | {"model_type": "qwen2_5_vl", "vision_config": VISION, "rope_theta": 1e6}
    assert text_part(flat) == flat
    assert text_config(flat).num_key_value_heads == 1


def test_the_text_part_alone():
    """As bundles keep it."""
    whole = Qwen2_5_VLConfig(text_config=QWEN2, vision_config=VISION).to_dict()
    assert text_config(text_part(whole)).to_diff_dict() == text_config(whole).to_diff_dict()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        (
            QWEN3 | {"model_type": "qwen3", "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
            "yarn",
        ),
        (QWEN3 | {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8}, "sliding-window"),
    ],
)
def test_refuses_what_it_does_not_implement(config, message):
    with pytest.raises(CheckpointError, match=message):
        text_config(config)
