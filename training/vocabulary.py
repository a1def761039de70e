"""Words that become tokens: of a small model's tokenizer, which has in pieces what it was not learned from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer


def without_special_tokens(texts: Iterable[str], special: Iterable[str]) -> list[str]:
    """What stands before, between and behind special tokens in some texts."""
    pieces = list(texts)
    for token in special:
        pieces = [part for piece in pieces for part in piece.split(token)]
    return [piece for piece in pieces if piece]


def extend(settings: dict[str, Any], texts: Iterable[str]) -> dict[int, list[int]]:
    """Add to a byte-level BPE tokenizer the merges that make every word of some texts one token.

    They come after its own merges, so words that were one token stay what they were.

    Args:
        settings: ``tokenizer.json``, which is changed.
        texts: what the words stand in; special tokens among them are none.

    Returns:
        Each new token's id -> the ids of the tokens it stands for.
    """
    model, special = settings["model"], {token["content"]: token["id"] for token in settings["added_tokens"]}
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    texts = dict.fromkeys(without_special_tokens(texts, special))
    words = dict.fromkeys(word for text in texts for word in _words(tokenizer, text))
    # A special token's id is that of its entry where it has one; else they are counted behind all others.
    entries = model["vocab"] | special
    pieces: dict[int, list[int]] = {}
    for word in words:
        while len(found := [token.value for token in tokenizer.model.tokenize(word)]) > 1:
            joined = found[0] + found[1]
            model["merges"].append([found[0], found[1]])
            if joined not in entries:
                parts = [entries[part] for part in found[:2]]
                entries[joined] = len(entries)
                pieces[entries[joined]] = [old for part in parts for old in pieces.get(part, [part])]
            model["vocab"] = entries
            tokenizer = Tokenizer.from_str(json.dumps(settings))
    return pieces


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    """What a text is split into before merging, as bytes are written in the vocabulary."""
    if tokenizer.normalizer:
        text = tokenizer.normalizer.normalize_str(text)
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
