"""Words that become tokens, beside transformers' own reading of the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from zimgkit.runtime import demo_models
from zimgkit.runtime.text.edit_prompts import EDIT
from zimgkit.training.vocabulary import extend
from zimgkit.training.world.captions import caption
from zimgkit.training.world.edits import edit_to_learn
from zimgkit.training.world.sampling import sample

BASE = demo_models.locate("zimg-tiny-qwen") / "tokenizer"
PROMPTS = [edit_to_learn(seed).instruction for seed in range(60)]


@pytest.fixture
def settings() -> Any:
    return json.loads((BASE / "tokenizer.json").read_text())


def saved(settings: Any, folder: Path) -> Any:
    for file in BASE.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps(settings, ensure_ascii=False))
    return AutoTokenizer.from_pretrained(folder)


def test_each_word_is_a_token(settings: Any, tmp_path: Path) -> None:
    """So the template is as long as in the vocabulary of the real model, whose pipelines drop so many tokens."""
    before = Tokenizer.from_str(json.dumps(settings))
    pieces = extend(settings, [EDIT.prefix, EDIT.suffix, *PROMPTS])
    tokenizer = saved(settings, tmp_path)
    assert len(tokenizer(EDIT.prefix)["input_ids"]) == EDIT.drop < len(before.encode(EDIT.prefix).ids)
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        # Numbers stand alone in this vocabulary, and so does the space before one.
        assert len(ids) == len(prompt.split()) + sum(map(str.isdigit, prompt)), prompt
        assert tokenizer.decode(ids) == prompt
        # The pieces of what is new, and the rest, are what there was before.
        assert [old for token in ids for old in pieces.get(token, [token])] == before.encode(prompt).ids
    assert sorted(pieces) == [*range(before.get_vocab_size(), before.get_vocab_size() + len(pieces))]
    assert len(tokenizer) == before.get_vocab_size() + len(pieces)


def test_what_was_a_token_keeps_its_id(settings: Any, tmp_path: Path) -> None:
    before = AutoTokenizer.from_pretrained(BASE)
    extend(settings, PROMPTS)
    tokenizer = saved(settings, tmp_path)
    for seed in range(200):
        text = caption(sample(seed))
        assert tokenizer(text)["input_ids"] == before(text)["input_ids"], text
    for token in before.all_special_tokens:
        assert tokenizer.convert_tokens_to_ids(token) == before.convert_tokens_to_ids(token)


def test_a_word_of_many_pieces_and_one_that_is_there(settings: Any) -> None:
    """Of letters outside the alphabet too; a second time there is nothing left to add."""
    words = ["recolour recolour", "naïve", "a red circle", "abababab", "<|im_end|>", ""]
    pieces = extend(settings, words)
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    assert [len(tokenizer.encode(word).ids) for word in words] == [2, 1, 3, 1, 1, 0]
    assert pieces and extend(settings, words) == {}
