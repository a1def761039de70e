"""DINOv3's vision transformer, which describes a picture by the last state of its class token.

Source: ``DINOv3ViTModel`` of transformers 5, its pooled output. Pictures run one at a time at the one size that the
description is wanted of. Class and register tokens have no place in a picture: the host gives them angles of 0.

A network's ``forward`` only calls its children; each kind of child is traced once, see ``zimgkit.export.graphs.trace``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx import ops

from zimgkit.export.networks.layers import attention, split_heads
from zimgkit.export.networks.parts import Input, Part
from zimgkit.export.networks.vision_tower import VisionMLP

SOURCE = "dinov3"


@dataclass(frozen=True)
class Config:
    """What makes the network; the defaults are those of the releases."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_register_tokens: int = 4
    num_channels: int = 3
    patch_size: int = 16
    image_size: int = 224
    query_bias: bool = False
    key_bias: bool = False
    value_bias: bool = False
    layer_norm_eps: float = 1e-5

    @property
    def patches(self) -> int:
        """Of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Those and the class and register tokens before them."""
        return 1 + self.num_register_tokens + self.patches


class DinoEmbeddings(nn.Module):
    """Patches to tokens, behind the class token and the registers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, patch = config.hidden_size, config.patch_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.empty(1, config.num_register_tokens, dim))
        self.patch_embeddings = nn.Conv2d(config.num_channels, dim, (patch, patch))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(patches, values) float32 -> (1, tokens, dim)."""
        weight = self.patch_embeddings.weight.flatten(1)
        patches = F.linear(pixel_values.to(weight.dtype), weight, self.patch_embeddings.bias)
        return torch.cat([self.cls_token, self.register_tokens, patches.unsqueeze(0)], dim=1)


class DinoAttention(nn.Module):
    """Self-attention of all tokens."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim = config.hidden_size
        self.heads, self.head_dim = config.num_attention_heads, dim // config.num_attention_heads
        self.q_proj = nn.Linear(dim, dim, bias=config.query_bias)
        self.k_proj = nn.Linear(dim, dim, bias=config.key_bias)
        self.v_proj = nn.Linear(dim, dim, bias=config.value_bias)
        self.o_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(1, tokens, dim), two (1, tokens, head_dim / 2) -> (1, tokens, dim)."""
        query, key = (self._rotate(proj(x), cos, sin) for proj in (self.q_proj, self.k_proj))
        out: Tensor = self.o_proj(attention(*(self._heads(rows) for rows in (query, key, self.v_proj(x)))))
        return out

    def _rotate(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn pairs, of a head's first and second half, in float32."""
        return ops.rotary_embedding(rows.float(), cos, sin, num_heads=self.heads).to(rows.dtype)

    def _heads(self, rows: Tensor) -> Tensor:
        return split_heads(rows, self.head_dim).transpose(1, 2)


class DinoScale(nn.Module):
    """A factor for each channel of what a branch adds."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> the same."""
        return x * self.lambda1


class DinoBlock(nn.Module):
    """One block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attention, self.mlp = DinoAttention(config), VisionMLP(dim, config.intermediate_size)
        self.layer_scale1, self.layer_scale2 = DinoScale(dim), DinoScale(dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(1, tokens, dim), two (1, tokens, head_dim / 2) -> (1, tokens, dim)."""
        x = x + self.layer_scale1(self.attention(self.norm1(x), cos, sin))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class DinoNorm(nn.LayerNorm):
    """The last norm, of the class token alone; hands out float32."""

    def forward(self, x: Tensor) -> Tensor:
        """(1, tokens, dim) -> (1, dim) float32."""
        return super().forward(x[:, 0]).float()


class DinoTower(nn.Module):
    """The patches of one picture to what describes it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embeddings = DinoEmbeddings(config)
        self.layer = nn.ModuleList(DinoBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = DinoNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One picture, its patches row by row.

        Args:
            pixel_values: (patches, 768) float32, normalized pixels: channels, rows, columns.
            cos: (1, tokens, head_dim / 2) float32.
            sin: as ``cos``.

        Returns:
            (1, hidden_size) float32.
        """
        x = self.embeddings(pixel_values)
        for block in self.layer:
            x = block(x, cos, sin)
        out: Tensor = self.norm(x)
        return out


def tables(config: Config) -> dict[str, NDArray[np.float32]]:
    """``cos`` and ``sin`` for the tokens of a picture: of rows, then of columns, as ``DINOv3ViTRopePositionEmbedding``.

    Patches' centres run from -1 to 1.
    """
    side, quarter = config.image_size // config.patch_size, config.hidden_size // config.num_attention_heads // 4
    frequency = 1 / np.power(100.0, np.arange(quarter) / quarter).astype(np.float32)
    centre = 2 * (np.arange(0.5, side, dtype=np.float32) / side) - 1
    places = np.stack(np.meshgrid(centre, centre, indexing="ij"), axis=-1).reshape(-1, 2)
    angles = np.zeros((1, config.tokens, 2 * quarter), np.float32)
    angles[0, -len(places) :] = (2 * math.pi * places[:, :, None] * frequency).reshape(len(places), -1)
    return {"cos": np.cos(angles), "sin": np.sin(angles)}


def part(config: Config) -> Part:
    """The component that the encoder's file becomes; nothing of it is dynamic."""
    angles = (1, config.tokens, config.hidden_size // config.num_attention_heads // 2)
    return Part(
        SOURCE,
        lambda: DinoTower(config),
        inputs=(
            Input("pixel_values", torch.float32, (config.patches, config.num_channels * config.patch_size**2)),
            Input("cos", torch.float32, angles),
            Input("sin", torch.float32, angles),
        ),
        outputs=("picture_embeds",),
    )
