"""Layers both transformers share, in the form the exporter traces best."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx import ops


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn adjacent pairs of ``x`` by the angles whose cosines and sines are given.

    Becomes one ONNX ``RotaryEmbedding``. Computed in float32, as the reference pipelines do.

    Args:
        x: (batch, heads, tokens, head_dim).
        cos: (batch, tokens, head_dim / 2), float32.
        sin: as ``cos``.
    """
    return ops.rotary_embedding(x.float(), cos, sin, interleaved=True).to(x.dtype)


def weight_dtype(module: nn.Module) -> torch.dtype:
    """The element type a module computes in."""
    return next(module.parameters()).dtype


class Tables(nn.Module):
    """The RoPE tables for each picture of the batch, widened once for all blocks."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, ...), two (tokens, head_dim / 2) tables -> two (batch, tokens, head_dim / 2) tables."""
        batch = x.shape[0]
        return cos.unsqueeze(0).expand(batch, -1, -1), sin.unsqueeze(0).expand(batch, -1, -1)


class Border(nn.Module):
    """The border of a graph: whatever it computes in, it hands out float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, to float32."""
        return x.float()


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention; becomes one ONNX ``Attention``.

    Args:
        query: (batch, heads, tokens, head_dim).
        key: as ``query``.
        value: as ``query``.
        mask: bool (batch or 1, 1, tokens, tokens), whether a token, in rows, sees another; all see all where None.

    Returns:
        (batch, tokens, heads * head_dim).
    """
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(batch, tokens, heads * head_dim) -> (batch, tokens, heads, head_dim)."""
    return x.unflatten(-1, (-1, head_dim))
