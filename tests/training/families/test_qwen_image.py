"""How an untrained text model begins."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from zimgkit.training.checkpoint import initialize
from zimgkit.training.families.qwen_image import CONFIGS, look_nearby


@pytest.fixture(scope="module")
def language_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**CONFIGS["text_encoder"]))
    initialize(model)
    look_nearby(model)
    model.model.language_model.config._attn_implementation = "eager"
    return model.model.language_model.eval()


def test_heads_look_at_the_tokens_before(language_model: torch.nn.Module) -> None:
    """Wherever a token stands; transformers' own attention, with what depends on the tokens taken out."""
    weights = {name: value.clone() for name, value in language_model.state_dict().items()}
    with torch.no_grad():
        for layer in language_model.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.k_proj.weight.zero_()
        found = language_model(input_ids=torch.arange(60)[None], output_attentions=True).attentions
    language_model.load_state_dict(weights)
    for attention in found:
        heads = attention[0]
        for place in (10, 40, 59):
            for head in range(len(heads) - 1):
                assert int(heads[head, place].argmax()) == place - head - 1
                assert heads[head, place, place - 4 :].sum() > 0.8
            even = torch.full((place + 1,), 1 / (place + 1))
            torch.testing.assert_close(heads[-1, place, : place + 1], even, atol=1e-4, rtol=0)


def test_a_word_is_seen_by_those_after_it_behind_a_long_template(language_model: torch.nn.Module) -> None:
    ids = torch.randint(1000, 2000, (2, 44), generator=torch.Generator().manual_seed(0))
    ids[1] = ids[0]
    ids[1, 36] = 7
    with torch.no_grad():
        rows = language_model(input_ids=ids).last_hidden_state
    change = (rows[0] - rows[1]).norm(dim=-1) / rows[0].norm(dim=-1)
    assert change[:36].max() == 0
    assert change[37:40].mean() > 0.3
