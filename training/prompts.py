"""Prompts on the way to the transformer: token ids in batches, and what the text model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zimgkit.runtime.families import family as host
from zimgkit.training.tokenizer import templated

NO_PROMPT = {"z-image": ("",), "qwen-image": (" ", "")}
"""Family -> what stands for no prompt in guidance; Qwen-Image's pipelines take a single space."""


def tokenize(prompts: Sequence[str], tokenizer: Any, family: str) -> list[Tensor]:
    """Prompts in their templates as token ids, int64 (tokens,) each, cut where the pipeline cuts them."""
    limit = host(family).TEXT.max_tokens
    ids = tokenizer([templated(prompt, tokenizer, family) for prompt in prompts])["input_ids"]
    return [torch.tensor(one[:limit]) for one in ids]


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of unequal lengths as one tensor, zeros at their ends, and a bool mask, True where there is a row."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True), mask


def encode(text_encoder: Any, input_ids: Tensor, mask: Tensor, family: str) -> tuple[Tensor, Tensor]:
    """The text model's rows that a picture is conditioned on, as the family's pipeline takes them.

    Args:
        text_encoder: ``Qwen3Model`` or ``Qwen2_5_VLForConditionalGeneration``.
        input_ids: (batch, tokens) int64.
        mask: (batch, tokens) bool.
        family: ``"z-image"`` or ``"qwen-image"``.

    Returns:
        Embeddings (batch, tokens, hidden) and their mask; for Qwen-Image without the head of the template.
    """
    drop = host(family).TEXT.drop
    if family == "z-image":
        states = text_encoder(input_ids=input_ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return states.hidden_states[-2], mask
    model = text_encoder.model.language_model
    rows = model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    return rows[:, drop:], mask[:, drop:]


def encode_all(text_encoder: Any, prompts: Sequence[Tensor], family: str) -> list[Tensor]:
    """The rows of many prompts, one at a time: (tokens, hidden) each, in the text model's own type, on the CPU."""
    device = next(text_encoder.parameters()).device
    with torch.no_grad():
        rows = []
        for ids in prompts:
            mask = torch.ones(1, len(ids), dtype=torch.bool, device=device)
            rows.append(encode(text_encoder, ids[None].to(device), mask, family)[0][0].cpu())
    return rows
