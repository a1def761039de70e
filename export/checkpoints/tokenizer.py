"""The tokenizer and the prompt template, from what transformers makes of the checkpoint to what the runtime reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from zimgkit.engines.bundle import TextConfig
from zimgkit.engines.errors import CheckpointError

PROMPT = "\u2060prompt\u2060"
"""Stands for the prompt while a chat template is rendered; nothing a template contains."""


def export_tokenizer(folder: Path, target: Path, text: TextConfig, *, chat_template: bool) -> TextConfig:
    """Write ``tokenizer.json`` into a bundle and find the prompt's template.

    Args:
        folder: the checkpoint's ``tokenizer/``.
        target: the bundle's ``tokenizer/``, which is made.
        text: the family's template and limits.
        chat_template: whether the reference pipeline renders the tokenizer's own chat template.

    Returns:
        ``text``, with the checkpoint's own template where the pipeline uses one.

    Raises:
        CheckpointError: the folder is missing or holds no tokenizer zimgkit can read.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing", "fetch the checkpoint again")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        definition = backend.to_str(pretty=False)
    except Exception as error:  # transformers raises whatever its parsers raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder} holds no tokenizer zimgkit can read ({reason})", "fetch it again") from None
    target.mkdir()
    (target / "tokenizer.json").write_text(definition, encoding="utf-8")
    if chat_template and tokenizer.chat_template:
        prefix, suffix = _split_template(tokenizer, folder)
        return msgspec.structs.replace(text, prefix=prefix, suffix=suffix)
    return text


def _split_template(tokenizer: Any, folder: Path) -> tuple[str, str]:
    """What the chat template puts before and after a user's turn, rendered as the reference pipeline does."""
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
    except Exception as error:  # jinja's errors, or what the template itself raises
        raise CheckpointError(f"{folder}: the chat template cannot be rendered ({error})") from None
    prefix, found, suffix = rendered.partition(PROMPT)
    if not found or PROMPT in suffix:
        raise CheckpointError(f"{folder}: the chat template does not contain the prompt once, as it is")
    return prefix, suffix
