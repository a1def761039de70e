"""A small tokenizer of Qwen's kind: byte-level BPE learned from captions, around the real special tokens and template.

A pipeline may drop as many tokens as its template's head has in the real vocabulary: one for each word, mark and line
break. Here every word of those heads is made a token too, so the number is the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zimgkit.export.demo import CHAT_TEMPLATE, ROLES, SPECIAL_TOKENS
from zimgkit.runtime.families import FAMILIES, Family
from zimgkit.training.vocabulary import without_special_tokens

LEARNED_TOKENS = 1024
"""The most entries of a small model's vocabulary, bytes and merges, before the special tokens."""
REPEATS = 1000
"""How often the templates stand in what is learned from: often enough that none of their words is left in pieces."""


def train_tokenizer(captions: Iterable[str], vocabulary: int) -> Any:
    """Learn a tokenizer.

    Chinese characters are learned one by one: a merge of two would make tokens of frequent phrases, and a combination
    that never occurred would then be spelled differently from those that did.

    Args:
        captions: what prompts look like.
        vocabulary: the most entries before the special tokens; the first 256 are bytes.

    Returns:
        A ``Qwen2Tokenizer`` of transformers, with the special tokens and the chat template.
    """
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    learner = Tokenizer(BPE())
    learner.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            split(Regex(r"\p{Han}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=vocabulary, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    templates = [part for family in FAMILIES.values() for part in (family.TEXT.prefix, family.TEXT.suffix)]
    text = without_special_tokens(templates, SPECIAL_TOKENS)
    learner.train_from_iterator([*(part for part in text for _ in range(REPEATS)), *captions], trainer)
    entries = learner.get_vocab()
    tokenizer: Any = Qwen2Tokenizer(
        vocab=entries,
        merges=_merges(learner),
        **ROLES,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "right"
    return tokenizer


def _merges(learner: Any) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


def templated(prompt: str, tokenizer: Any, host: type[Family]) -> str:
    """A prompt in its template, as the family's pipeline puts it before tokenizing."""
    if host.USES_CHAT_TEMPLATE:
        turn = [{"role": "user", "content": prompt}]
        return str(
            tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        )
    return host.TEXT.prefix + prompt + host.TEXT.suffix
