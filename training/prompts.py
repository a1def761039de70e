"""Prompts on the way to the transformer: token ids in batches, and what the text model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zimgkit.training.families import TrainingFamily
from zimgkit.training.tokenizer import templated

TOGETHER = 32
"""Prompts that are encoded at once."""


def tokenize(prompts: Sequence[str], tokenizer: Any, family: TrainingFamily) -> list[Tensor]:
    """Prompts in their templates as token ids, int64 (tokens,) each, cut where the pipeline cuts them."""
    ids = tokenizer([templated(prompt, tokenizer, family.host) for prompt in prompts])["input_ids"]
    return [torch.tensor(one[: family.host.TEXT.max_tokens]) for one in ids]


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of unequal lengths as one tensor, zeros at their ends, and a bool mask, True where there is a row."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True), mask


def encode_all(text_encoder: Any, prompts: Sequence[Tensor], family: TrainingFamily) -> list[Tensor]:
    """The rows of many prompts: (tokens, hidden) each, in the text model's own type, on the CPU."""
    device = next(text_encoder.parameters()).device
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(index)
    rows: dict[int, Tensor] = {}
    with torch.no_grad():
        for indexes in by_length.values():
            for start in range(0, len(indexes), TOGETHER):
                part = indexes[start : start + TOGETHER]
                ids = torch.stack([prompts[index] for index in part]).to(device)
                encoded = family.encode(text_encoder, ids, torch.ones_like(ids, dtype=torch.bool))[0].cpu()
                rows |= {index: row.clone() for index, row in zip(part, encoded, strict=True)}
    return [rows[index] for index in range(len(prompts))]
