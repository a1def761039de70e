"""Peft's config of a LoRA: which alpha a module gets, as peft itself decides it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft.utils.other import get_pattern_key

from zimgkit.engines.errors import LoraError
from zimgkit.export.checkpoints.peft_config import DIFFUSERS_CONFIG, read_peft_config

MODULES = ["to_k", "layers.1.attention.to_k", "layers.11.attention.to_k", "layers.1.attention.to_out.0", "stack"]
PATTERNS = [
    "to_k",
    "attention.to_k",
    "layers.1.attention.to_k",
    "to_out.0",
    "ack",
    r".*\.to_(q|k)",
    r"layers\.\d+\..*0",
]
SLOW = r"((?:\w{1,9}){1,9}){1,9}([^\w.])"
"""Tries every way to cut a name into pieces."""


def beside(folder, text):
    (folder / "adapter_config.json").write_text(text)
    return read_peft_config(folder / "adapter_model.safetensors", {})


def in_the_header(folder, text):
    return read_peft_config(folder / "lora.safetensors", {DIFFUSERS_CONFIG: text})


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_as_peft_has_them(tmp_path, pattern):
    config = beside(tmp_path, json.dumps({"lora_alpha": 3, "alpha_pattern": {pattern: 5}}))
    expected = [5 if get_pattern_key([pattern], name) == pattern else 3 for name in MODULES]
    assert [config.alpha_of(name) for name in MODULES] == expected


def test_the_first_pattern_counts(tmp_path):
    config = beside(tmp_path, '{"alpha": 3, "alpha_pattern": {"(a+)+b": 1, "to_(k|q)": 5, "to_k": 7}}')
    assert (config.alpha_of("x.to_k"), config.alpha_of("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")) == (5, 3)


def test_keys_in_the_header_have_a_prefix(tmp_path):
    config = in_the_header(tmp_path, '{"transformer.r": 4, "transformer.lora_alpha": 6, "transformer.peft_type": []}')
    assert (config.r, config.alpha_of("to_k")) == (4, 6)


def test_none():
    assert read_peft_config(Path("lora.safetensors"), {}) is None


@pytest.mark.parametrize("read", [beside, in_the_header])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": "auto"}, r"lora_alpha is 'auto' \(expected `float \| null`, got `str`\)"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"r": 0}, "r is 0"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"alpha_pattern": {"to_k": "2"}}, "alpha_pattern"),
        ({"alpha_pattern": ["to_k"]}, "alpha_pattern is"),
        ([], "object"),
    ],
)
def test_refuses_other_types(tmp_path, read, config, message):
    with pytest.raises(LoraError, match=message):
        read(tmp_path, json.dumps(config))


@pytest.mark.parametrize(("pattern", "message"), [("(", "no regular expression"), (SLOW, "takes too long")])
def test_refuses_patterns(tmp_path, pattern, message):
    config = beside(tmp_path, json.dumps({"lora_alpha": 3, "alpha_pattern": {pattern: 2}}))
    with pytest.raises(LoraError, match=message):
        config.alpha_of("transformer_blocks.0.attn.add_k_proj_of_a_module_with_a_long_name")
