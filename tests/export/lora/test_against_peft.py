"""Adapters that peft trains and saves, merged as its ``merge_and_unload`` merges them."""

from __future__ import annotations

import copy

import pytest
import torch

from tests import reference
from tests.export.lora.lora_files import assert_near, merged_by

peft = pytest.importorskip("peft", reason="the reference is peft")

CONFIGS = {
    "LoRA": ("LoraConfig", {"r": 4, "lora_alpha": 6, "alpha_pattern": {"to_k": 3}, "rank_pattern": {"to_k": 2}}),
    "rank-stabilized": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "DoRA": ("LoraConfig", {"r": 4, "lora_alpha": 2, "use_dora": True}),
    "LoHa": ("LoHaConfig", {"r": 3, "alpha": 2}),
    "LoKr": ("LoKrConfig", {"r": 2, "alpha": 3}),
    "LoKr of full factors": ("LoKrConfig", {"r": 100, "alpha": 30}),
}


@pytest.fixture(scope="module")
def models():
    return {family: make() for family, make in reference.FAMILIES.items()}


def adapted(model, name, targets):
    """A copy with an adapter of random numbers."""
    kind, options = CONFIGS[name]
    found = peft.get_peft_model(copy.deepcopy(model), getattr(peft, kind)(target_modules=targets, **options))
    generator = torch.Generator().manual_seed(5)
    for key, parameter in found.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 1 + 0.2 * noise if "magnitude" in key else 0.3 * noise
    return found


def changed(before, after):
    return {name: after[name] for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
@pytest.mark.parametrize("name", CONFIGS)
def test_transformer(models, checkpoint_of, tmp_path, family, name):
    model = models[family].transformer
    found = adapted(model, name, ["to_q", "to_k", "w1"] if family == "z-image" else ["to_q", "to_k", "img_mod.1"])
    found.save_pretrained(tmp_path)
    expected = changed(model.state_dict(), found.merge_and_unload().state_dict())
    assert expected
    assert_near(merged_by(checkpoint_of(family), tmp_path), expected)


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_text_encoder(models, checkpoint_of, tmp_path, family):
    """Layers that no picture needs, such as Qwen3's last, are left out without a word."""
    model = models[family].text_encoder
    found = adapted(model, "LoRA", ["q_proj", "down_proj"])
    found.save_pretrained(tmp_path)
    expected = changed(model.state_dict(), found.merge_and_unload().state_dict())
    expected = {
        name.removeprefix("model.").removeprefix("language_model."): value
        for name, value in expected.items()
        if "visual" not in name and not (family == "z-image" and ".2." in f".{name}")
    }
    assert expected
    assert_near(merged_by(checkpoint_of(family), tmp_path, component="text_encoder"), expected)
    assert not merged_by(checkpoint_of(family), tmp_path)
