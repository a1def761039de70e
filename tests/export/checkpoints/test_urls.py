"""Addresses as people paste them."""

from __future__ import annotations

import pytest

from zimgkit.engines.errors import UsageError
from zimgkit.export.checkpoints.urls import Address, parse_url

HF, MS = "huggingface", "modelscope"
FILE = "a/b c.safetensors"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://huggingface.co/o/n", Address(HF, "o/n")),
        ("http://www.huggingface.co/o/n/", Address(HF, "o/n")),
        ("HTTPS://HuggingFace.co/o/n?library=diffusers#usage", Address(HF, "o/n")),
        ("huggingface.co/o/n", Address(HF, "o/n")),
        ("https://hf-mirror.com/o/n", Address(HF, "o/n")),
        ("hf.co/o/n.v-2_x", Address(HF, "o/n.v-2_x")),
        ("https://user:secret@huggingface.co/o/n", Address(HF, "o/n")),
        ("https://huggingface.co/o/n/tree/main", Address(HF, "o/n")),
        ("https://huggingface.co/o/n/tree/main/transformer", Address(HF, "o/n", None, "transformer")),
        ("https://huggingface.co/o/n/tree/refs%2Fpr%2F3", Address(HF, "o/n", "refs/pr/3")),
        ("https://huggingface.co/o/n/commit/0b1c", Address(HF, "o/n", "0b1c")),
        ("https://huggingface.co/o/n/discussions/3", Address(HF, "o/n")),
        ("https://huggingface.co/o/n/blob/v1/a/b%20c.safetensors", Address(HF, "o/n", "v1", FILE)),
        ("https://huggingface.co/o/n/resolve/main/a/b%20c.safetensors?download=true", Address(HF, "o/n", None, FILE)),
        ("https://huggingface.co/o/n/raw/main/model_index.json", Address(HF, "o/n", None, "model_index.json")),
        ("hf://o/n", Address(HF, "o/n")),
        ("o/name-2@v1", Address(HF, "o/name-2", "v1")),
        ("o/name-2@main/a.safetensors", Address(HF, "o/name-2", None, "a.safetensors")),
        ("hf://o/name-2/", Address(HF, "o/name-2")),
        ("hf://o/name-2@v1/a/b.safetensors", Address(HF, "o/name-2", "v1", "a/b.safetensors")),
        ("hf://o/n@v1", Address(HF, "o/n", "v1")),
        ("hf://o/n@refs%2Fpr%2F3/x.safetensors", Address(HF, "o/n", "refs/pr/3", "x.safetensors")),
        ("https://modelscope.cn/models/o/n", Address(MS, "o/n")),
        ("https://www.modelscope.cn/models/o/n/summary", Address(MS, "o/n")),
        ("https://www.modelscope.cn/models/o/n/files", Address(MS, "o/n")),
        ("https://modelscope.cn/models/o/n/tree/v1", Address(MS, "o/n", "v1")),
        (
            "https://modelscope.cn/models/o/n/file/view/master/a%2Fb%20c.safetensors?status=2",
            Address(MS, "o/n", None, FILE),
        ),
        ("https://modelscope.cn/models/o/n/resolve/v1/a/b c.safetensors", Address(MS, "o/n", "v1", FILE)),
    ],
)
def test_addresses(text: str, expected: Address) -> None:
    assert parse_url(text) == expected
    if not text.startswith(("h", "H", "mod")):
        assert parse_url(text, MS) == Address(
            MS, *[getattr(expected, name) for name in ("model_id", "revision", "path")]
        )
    assert parse_url(expected.model) == (Address(MS, expected.model_id) if expected.source == MS else None)
    if expected.path and (expected.revision or expected.source == MS):
        assert parse_url(expected.file) == expected
    elif expected.path:
        assert expected.file == f"{expected.model_id}/{expected.path}"
    assert "secret" not in f"{expected.model} {expected.file}"


@pytest.mark.parametrize(
    "text", ["", "o/n", "Z-Image", "./huggingface.co", "huggingface.co", "a/b/c", "://", "C:\\models\\z", "~/z"]
)
def test_what_is_no_address(text: str) -> None:
    assert parse_url(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "https://civitai.com/models/1", "https://huggingface.co", "https://huggingface.co/o", "https://[", "ftp://hf.co/o/n",
        "https://huggingface.co/datasets/o/n", "https://huggingface.co/o/-", "hf://o", "hf://", "file:///tmp/x",
        "https://huggingface.co/o/n/resolve/main/../../x", "hf://o/n/../x", "https://huggingface.co.evil.com/o/n",
        "https://huggingface.co/o/n/resolve/main/..%2F..%2Fx",
    ],
)  # fmt: skip
def test_what_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no address of a model|leads out of the model"):
        parse_url(text)
