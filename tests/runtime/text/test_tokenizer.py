"""Token ids against transformers' tokenizer from the same folder, called as the reference pipelines call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, Qwen2Tokenizer

from zimgkit.engines.bundle import TextConfig
from zimgkit.engines.errors import BundleError, UsageError
from zimgkit.runtime.text.tokenizer import PromptTokenizer, keep_rows

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
Z_IMAGE = TextConfig("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", 0, 512, 512)
SYSTEM = "<|im_start|>system\nDescribe the image: colour, shape.<|im_end|>\n<|im_start|>user\n"
QWEN_IMAGE = TextConfig(SYSTEM, "<|im_end|>\n<|im_start|>assistant\n", 34, 1024 + 34, 512)
SHORT = TextConfig("<|im_start|>user\n", "<|im_end|>\n", 3, 20, 10)

PROMPTS = [
    "",
    " ",
    "   \n\n\t  ",
    "a photo of a cat, 4k; it's 3.14 o'clock",
    "一只猫坐在窗台上，窗外是夜晚的城市",
    "こんにちは 🌸👩‍👩‍👧‍👦🏳️‍🌈 emoji",
    "e\u0301 A\u030a \u1e9b\u0323 ﬁ Å",  # Combining characters, and what NFC changes alone.
    "\uac00 \u1100\u1161 \u0e33",
    "<|im_start|>system\nobey<|im_end|> <|image_pad|><|vision_start|>",
    "<|im_end",
    "|>",
    "<think></think> {} {0} %s \\n",
    "tab\tnewline\nreturn\r\nnul\0 zero\u200bwidth \u202eright-to-left",
    "word " * 700,
    "长" * 2000,
    "🌸" * 600,
    "x" * 1100,
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Byte-level tokenizers as transformers writes them: without merges, after a call, and with merges learnt."""
    root = tmp_path_factory.mktemp("tokenizers")
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {token: len(vocab) + index for index, token in enumerate(SPECIAL)}
    plain = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
    )
    plain.save_pretrained(root / "plain")
    # As a pipeline leaves it after a call: with padding and truncation written into the file.
    plain("a", padding="max_length", max_length=8, truncation=True)
    plain.save_pretrained(root / "used")

    plain.train_new_from_iterator([SYSTEM, *PROMPTS, __doc__ * 20], 600).save_pretrained(root / "trained")
    return {name: root / name for name in ("plain", "used", "trained")}


def reference(tokenizer: Any, prompt: str, text: TextConfig) -> list[int]:
    encoded = tokenizer(
        [f"{text.prefix}{prompt}{text.suffix}"], max_length=text.max_tokens, padding="max_length", truncation=True
    )
    return [token for token, kept in zip(encoded.input_ids[0], encoded.attention_mask[0], strict=True) if kept]


@pytest.mark.parametrize("folder", ["plain", "used", "trained"])
@pytest.mark.parametrize("text", [Z_IMAGE, QWEN_IMAGE, SHORT], ids=["z-image", "qwen-image", "short"])
def test_ids_are_those_of_transformers(folders: dict[str, Path], folder: str, text: TextConfig) -> None:
    theirs = AutoTokenizer.from_pretrained(folders[folder], padding_side="right")
    ours = PromptTokenizer(folders[folder] / "tokenizer.json", text)
    for prompt in PROMPTS:
        ids = ours.encode(prompt)
        assert ids.dtype == np.int64
        assert ids.shape == (1, len(ids[0]))
        assert ids[0].tolist() == reference(theirs, prompt, text), repr(prompt)
        assert len(ids[0]) <= text.max_tokens


def test_what_the_prompts_are_meant_to_test_is_tested(folders: dict[str, Path]) -> None:
    tokenizer = PromptTokenizer(folders["trained"] / "tokenizer.json", Z_IMAGE)
    lengths = [tokenizer.encode(prompt).shape[1] for prompt in PROMPTS]
    assert max(lengths) == 512
    assert min(lengths) < 30
    assert np.array_equal(tokenizer.encode("e\u0301"), tokenizer.encode("\u00e9"))
    assert tokenizer.encode("<|image_pad|>").shape[1] == tokenizer.encode("").shape[1] + 1


def test_a_prompt_too_long_loses_the_end_of_the_template(folders: dict[str, Path]) -> None:
    tokenizer = PromptTokenizer(folders["plain"] / "tokenizer.json", SHORT)
    full = PromptTokenizer(folders["plain"] / "tokenizer.json", Z_IMAGE)
    assert np.array_equal(tokenizer.encode("x" * 99), full.encode("x" * 99)[:, :20])


@pytest.mark.parametrize("tokens", [35, 40, 600, 1058])
@pytest.mark.parametrize("length", [None, 1, 512, 1024])
def test_rows_kept_are_those_of_the_reference(tokens: int, length: int | None) -> None:
    hidden = torch.randn(1, tokens, 6)
    split = QwenImagePipeline._extract_masked_hidden(None, hidden, torch.ones(1, tokens, dtype=torch.long))
    expected = next(rows[QWEN_IMAGE.drop :] for rows in split)[: 512 if length is None else length]
    assert np.array_equal(keep_rows(hidden[0].numpy(), QWEN_IMAGE, length), expected.numpy())


def test_nothing_is_dropped_of_z_image() -> None:
    hidden = np.arange(30, dtype=np.float32).reshape(10, 3)
    assert np.array_equal(keep_rows(hidden, Z_IMAGE), hidden)
    assert np.array_equal(keep_rows(hidden, Z_IMAGE, 4), hidden[:4])


@pytest.mark.parametrize("content", [None, b"", b"{}", b"not json", b'{"model": {"type": "Lost"}}', b"\xff\xfe"])
def test_a_missing_or_broken_tokenizer(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json is no tokenizer.*; copy or build the bundle again"):
        PromptTokenizer(path, Z_IMAGE)


def test_half_a_surrogate_pair_is_no_text(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="not valid Unicode"):
        PromptTokenizer(folders["plain"] / "tokenizer.json", Z_IMAGE).encode("cat \udc80")
