"""SigLIP's vision tower at one size, whose pooling head describes a whole picture.

Source: ``SiglipVisionModel`` of transformers 5, its pooled output; SigLIP2 of a fixed size is this network. Its blocks
are those of :mod:`.siglip`. Pictures run one at a time, and each has as many patches as there are learned positions.

A network's ``forward`` only calls its children; each kind of child is traced once, see ``zimgkit.export.graphs.trace``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zimgkit.export.networks.layers import attention, split_heads
from zimgkit.export.networks.parts import Input, Part
from zimgkit.export.networks.siglip import Config, SiglipEncoder, SiglipMLP

SOURCE = "siglip"


class SiglipGridEmbeddings(nn.Module):
    """Patches to tokens, each with the position that was learned for it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, dim, (patch, patch))
        self.position_embedding = nn.Embedding(config.num_patches, dim)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(num_patches, values) float32 -> (1, num_patches, dim)."""
        weight = self.patch_embedding.weight.flatten(1)
        patches = F.linear(pixel_values.to(weight.dtype), weight, self.patch_embedding.bias)
        return (patches + self.position_embedding.weight).unsqueeze(0)


class PoolingAttention(nn.Module):
    """The parameters of ``torch.nn.MultiheadAttention``, for one query."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, probe: Tensor, x: Tensor) -> Tensor:
        """(1, 1, dim), (1, patches, dim) -> (1, 1, dim)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        rows = (F.linear(y, *own) for y, *own in zip((probe, x, x), weights, biases, strict=True))
        out: Tensor = self.out_proj(attention(*(split_heads(row, self.head_dim).transpose(1, 2) for row in rows)))
        return out


class SiglipPooling(nn.Module):
    """What a learned query finds in all patches; hands out float32."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim = config.hidden_size
        self.probe = nn.Parameter(torch.empty(1, 1, dim))
        self.attention = PoolingAttention(dim, config.num_attention_heads)
        self.layernorm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(dim, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """(1, patches, dim) -> (1, dim) float32."""
        pooled = self.attention(self.probe, x)
        return (pooled + self.mlp(self.layernorm(pooled))).squeeze(1).float()


class PooledSiglipTower(nn.Module):
    """The patches of one picture to what describes it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embeddings, self.encoder = SiglipGridEmbeddings(config), SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = SiglipPooling(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """One picture, its patches row by row.

        Args:
            pixel_values: (num_patches, 768) float32, normalized pixels: channels, rows, columns.

        Returns:
            (1, hidden_size) float32.
        """
        x = self.embeddings(pixel_values)
        for block in self.encoder.layers:
            x = block(x)
        out: Tensor = self.head(self.post_layernorm(x))
        return out


def part(config: Config) -> Part:
    """The component that the encoder's file becomes; nothing of it is dynamic."""
    return Part(
        SOURCE,
        lambda: PooledSiglipTower(config),
        inputs=(
            Input("pixel_values", torch.float32, (config.num_patches, config.num_channels * config.patch_size**2)),
        ),
        outputs=("picture_embeds",),
    )
