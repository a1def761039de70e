"""SigLIP2's vision tower, which reads pictures for a transformer that takes its rows as tokens.

Source: ``Siglip2VisionModel`` of transformers 5, its last hidden state. Pictures run one at a time at their exact
size, so that attention needs no mask. Its learned positions are those of a square grid; stretching them to a picture's
grid is a product with weights that the host makes.

A network's ``forward`` only calls its children; each kind of child is traced once, see ``zimgkit.export.graphs.trace``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zimgkit.engines.decoding import Count, Positive, Small, Width, decoded
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.layers import attention, split_heads
from zimgkit.export.networks.parts import Input, Part

FILE = "siglip/config.json"


class Config(msgspec.Struct, frozen=True):
    """What of ``siglip/config.json`` makes the network; the defaults are transformers'."""

    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Small = 12
    num_attention_heads: Small = 12
    num_channels: Small = 3
    num_patches: Count = 256
    patch_size: Small = 16
    layer_norm_eps: Positive = 1e-6
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"


def read_config(config: Mapping[str, Any]) -> Config:
    """Read ``siglip/config.json``.

    Raises:
        CheckpointError: it is of no network that is implemented here; naming the key.
    """
    found = decoded(config, Config, FILE, CheckpointError)
    if found.hidden_size % found.num_attention_heads:
        raise CheckpointError(f"{FILE}: hidden_size is no multiple of num_attention_heads")
    if math.isqrt(found.num_patches) ** 2 != found.num_patches:
        raise CheckpointError(f"{FILE}: num_patches is {found.num_patches}, no square")
    return found


class SiglipEmbeddings(nn.Module):
    """Patches to tokens, with their positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, pixel_values: Tensor, interpolation: Tensor) -> Tensor:
        """(patches, values), (patches, num_patches), both float32 -> (1, patches, dim)."""
        dtype = self.patch_embedding.weight.dtype
        positions = interpolation.to(dtype) @ self.position_embedding.weight
        return (self.patch_embedding(pixel_values.to(dtype)) + positions).unsqueeze(0)


class SiglipAttention(nn.Module):
    """Self-attention with biases."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.k_proj, self.v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.q_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(1, patches, dim) -> the same."""
        rows = (split_heads(proj(x), self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.out_proj(attention(*rows))
        return out


class SiglipMLP(nn.Module):
    """Two linears."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class SiglipBlock(nn.Module):
    """One block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.self_attn = SiglipAttention(dim, config.num_attention_heads)
        self.mlp = SiglipMLP(dim, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """(1, patches, dim) -> the same."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipNorm(nn.LayerNorm):
    """The last norm; hands out float32."""

    def forward(self, x: Tensor) -> Tensor:
        """(1, patches, dim) -> (patches, dim) float32."""
        return super().forward(x).squeeze(0).float()


class SiglipEncoder(nn.Module):
    """What the checkpoint has under this name."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SiglipBlock(config) for _ in range(config.num_hidden_layers))


class SiglipTower(nn.Module):
    """The patches of one picture to rows for the transformer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embeddings, self.encoder = SiglipEmbeddings(config), SiglipEncoder(config)
        self.post_layernorm = SiglipNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, interpolation: Tensor) -> Tensor:
        """One picture, its patches row by row.

        Args:
            pixel_values: (patches, 768) float32, normalized pixels: rows, columns, channels.
            interpolation: (patches, num_patches) float32, how much each patch takes of each learned position.

        Returns:
            (patches, hidden_size) float32.
        """
        x = self.embeddings(pixel_values, interpolation)
        for block in self.encoder.layers:
            x = block(x)
        out: Tensor = self.post_layernorm(x)
        return out


def parts(config: Mapping[str, Any]) -> dict[str, Part]:
    """The component that the checkpoint's ``siglip`` becomes.

    Raises:
        CheckpointError: the config is of no network that zimgkit implements.
    """
    found = read_config(config)
    part = Part(
        "siglip",
        lambda: SiglipTower(found),
        inputs=(
            Input("pixel_values", torch.float32, ("patches", found.num_channels * found.patch_size**2)),
            Input("interpolation", torch.float32, ("patches", found.num_patches)),
        ),
        outputs=("picture_embeds",),
        sizes=({"patches": 91}, {"patches": 130}),
    )
    return {"vision_encoder": part}
