from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from zimgkit.training import families
from zimgkit.training.prompts import tokenize
from zimgkit.training.tokenizer import train_tokenizer

CAPTIONS = [
    *(f"a {colour} {shape} left of a blue square" for colour in ("red", "green") for shape in ("circle", "triangle")),
    *(f"{colour}的{shape}在左边" for colour in ("红色", "绿色") for shape in ("圆形", "三角形")),
] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(CAPTIONS, 1024)


def test_the_head_of_the_template_has_as_many_tokens_as_the_pipeline_drops(tokenizer: Any) -> None:
    family = families.family("qwen-image")
    text = family.host.TEXT
    assert len(tokenizer(text.prefix)["input_ids"]) == text.drop == 34
    for prompt in ("a red circle", "红色的圆形", " ", "", "Zebra 42!"):
        (ids,) = tokenize([prompt], tokenizer, family)
        assert tokenizer.decode(ids[34:]) == prompt + text.suffix


def test_words_are_tokens_and_chinese_characters_are(tokenizer: Any) -> None:
    assert tokenizer.tokenize("a red circle left of") == ["a", "Ġred", "Ġcircle", "Ġleft", "Ġof"]
    assert len(tokenizer.tokenize("红色的三角形")) == 6


def test_combinations_never_seen_are_spelled_as_those_seen(tokenizer: Any) -> None:
    seen = set(tokenizer("红色的圆形绿色的三角形")["input_ids"])
    assert set(tokenizer("绿色的圆形红色的三角形")["input_ids"]) == seen


@pytest.mark.parametrize("text", ["naïve café", "日本語 한국어", "🙂 1234", "a\nb\t c"])
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_saved_and_loaded_it_is_the_same(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\na red circle 红色<|im_end|>\n"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.pad_token == "<|endoftext|>"


def test_the_vocabulary_is_bounded() -> None:
    assert len(train_tokenizer(CAPTIONS, 300)) == 300 + 8
