"""``zimg-export inspect`` of a LoRA."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.commands import invoke
from tests.export.lora import lora_files
from zimgkit.export.cli.main import main

WEIGHTS = {
    "z-image": {
        "layers.0.attention.to_q": torch.empty(48, 32),
        "layers.1.attention.to_q": torch.empty(48, 32),
        "layers.0.feed_forward.w1": torch.empty(64, 48),
    },
    "qwen-image": {
        "transformer_blocks.0.attn.to_q": torch.empty(48, 48),
        "transformer_blocks.1.img_mod.1": torch.empty(96, 48),
    },
}
NAMES = {
    "diffusers": "diffusers (transformer.…)",
    "DiffSynth": "DiffSynth (….lora_A.default.weight)",
    "kohya": "kohya (lora_unet_…)",
    "lightx2v": "lora_down and lora_up",
    "ComfyUI": "ComfyUI (diffusion_model.…)",
    "ComfyUI with alpha": "ComfyUI (diffusion_model.…)",
}


@pytest.mark.parametrize("family", WEIGHTS)
@pytest.mark.parametrize("name", lora_files.FORMATS)
def test_formats(family, name, tmp_path):
    stored = lora_files.FORMATS[name](lora_files.pairs(WEIGHTS[family], rank=5))
    path = lora_files.write(tmp_path / "lora.safetensors", stored)
    for argument in (path, tmp_path):
        found = json.loads(invoke(main, "inspect", argument, "--json").out)
        assert found["format"] == NAMES[name]
        assert found["families"] == [family]
        assert (found["kinds"], found["dora"], found["ranks"]) == (["LoRA"], False, [5])
        assert found["modules"] == len(WEIGHTS[family])
        assert found["widest"] == ([64, 48] if family == "z-image" else [96, 48])
    has_alpha = name in ("kohya", "lightx2v", "ComfyUI with alpha")
    assert found["has_alpha"] == has_alpha
    assert bool(found["alphas"]) == has_alpha
    assert sum(found["targets"].values()) == found["modules"]
    text = invoke(main, "inspect", path).out
    assert f"lora.safetensors  (LoRA, for {family})" in text
    assert "rank      5" in text
    assert ("alpha     1, 2" in text) == has_alpha


def test_other_kinds(tmp_path):
    stored = {"lycoris_layers_0_attention_to_q.lokr_w1": torch.zeros(4, 4)}
    stored |= {"lycoris_layers_0_attention_to_q.lokr_w2_a": torch.zeros(6, 2)}
    stored |= {"lycoris_layers_0_attention_to_q.lokr_w2_b": torch.zeros(2, 8)}
    stored |= {f"lycoris_layers_1_attention_to_q.hada_w{i}_{s}": torch.ones(3, 3) for i in (1, 2) for s in "ab"}
    stored |= {"lycoris_layers_1_attention_to_q.dora_scale": torch.ones(3, 1)}
    path = lora_files.write(tmp_path / "lora.safetensors", stored)
    found = json.loads(invoke(main, "inspect", path, "--json").out)
    assert (found["kinds"], found["dora"], found["ranks"]) == (["LoHa", "LoKr"], True, [2, 3])
    assert "LoHa, LoKr with DoRA, for z-image" in invoke(main, "inspect", path).out


def test_a_model_of_others(tmp_path):
    stored = {f"lora_unet_something_else.lora_{side}.weight": torch.ones(3, 3) for side in ("up", "down")}
    path = lora_files.write(tmp_path / "lora.safetensors", stored)
    assert "for a model that zimgkit does not know" in invoke(main, "inspect", path).out


def test_an_alpha_under_another_name_of_its_module(tmp_path):
    pairs = {f"to.q.lora.{side}.weight": torch.ones(3, 3) for side in ("down", "up")}
    stored = {f"layers.0.attention.{end}": value for end, value in pairs.items()}
    path = lora_files.write(
        tmp_path / "lora.safetensors", stored | {"layers.0.attention.to_q.alpha": torch.tensor(2.0)}
    )
    found = json.loads(invoke(main, "inspect", path, "--json").out)
    assert (found["modules"], found["alphas"], found["has_alpha"]) == (1, [2.0], True)
    stored = {"layers.0.attention.to_q.alpha": torch.tensor(2.0)}
    alone = lora_files.write(tmp_path / "alone.safetensors", stored)
    invoke(main, "inspect", alone).assert_refused("is no LoRA", 1)


def test_what_is_none(tmp_path, checkpoint_of):
    (tmp_path / "lora.pt").write_bytes(b"\x80\x04.")
    invoke(main, "inspect", tmp_path / "lora.pt").assert_refused("is a pickle, which zimgkit never opens", 1)
    invoke(main, "inspect", tmp_path / "no.safetensors").assert_refused("there is no LoRA", 1)
    (file,) = (checkpoint_of("z-image") / "transformer").glob("*.safetensors")
    shutil.copy(file, tmp_path / "whole.safetensors")
    # A checkpoint is still one, and so is a file of one.
    assert "becomes" in invoke(main, "inspect", tmp_path / "whole.safetensors", "--base", checkpoint_of("z-image")).out
    assert "becomes" in invoke(main, "inspect", checkpoint_of("z-image")).out
