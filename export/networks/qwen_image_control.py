"""ControlNets of Qwen-Image.

Source: ``QwenImageBlockWiseControlNet`` of DiffSynth-Studio 2.1 (after each of the transformer's blocks a net of two
linears reads its image tokens and those of a picture, and adds to the former).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.parts import SCALE, ControlNet, Input
from zimgkit.export.networks.qwen_image import read_config

MASK_FEATURES = 4
"""Of a token: the mask at its 2 x 2 latents."""


class ControlEmbedding(nn.Linear):
    """Packed latents of a picture to tokens."""

    def forward(self, control: Tensor) -> Tensor:
        """(1, tokens, 64 or 68) float32 -> (1, tokens, dim)."""
        return super().forward(control.to(self.weight.dtype))


class BlockwiseBlock(nn.Module):
    """What is added to the image tokens that a block of the transformer gave."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.x_rms, self.y_rms = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.input_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, image: Tensor, condition: Tensor, scale: Tensor) -> Tensor:
        """(batch, tokens, dim), (1, tokens, dim), (1,) float32 -> (batch, tokens, dim)."""
        x = self.x_rms(image) + self.y_rms(condition)
        out = self.output_proj(F.gelu(self.input_proj(x)))
        return (out.float() * scale).to(image.dtype)


class BlockwiseControlNet(nn.Module):
    """A block for each of the transformer's."""

    def __init__(self, layers: int, features: int, dim: int) -> None:
        super().__init__()
        self.img_in = ControlEmbedding(features, dim)
        self.controlnet_blocks = nn.ModuleList(BlockwiseBlock(dim) for _ in range(layers))


def blockwise(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], own: Mapping[str, Any]) -> ControlNet:
    """The Canny, Depth and Inpaint nets: the last also takes a mask, and needs it.

    Raises:
        CheckpointError: the net is of another width, or has another number of blocks than the transformer.
    """
    transformer = read_config(config)
    dim, features = shapes["img_in.weight"]
    layers = len({name.split(".")[1] for name in shapes if name.startswith("controlnet_blocks.")})
    if (layers, dim) != (transformer.num_layers, transformer.width):
        has = f"it has {layers} blocks of width {dim}"
        hint = "name a net of this model"
        raise CheckpointError(f"{has}, and the transformer {transformer.num_layers} of {transformer.width}", hint)
    masked = features - transformer.in_channels
    if masked not in (0, MASK_FEATURES):
        takes = f"{transformer.in_channels} or {transformer.in_channels + MASK_FEATURES}"
        raise CheckpointError(f"its tokens have {features} features", f"zimgkit knows nets of {takes}")
    taken = ("image", "mask") if masked else ("image",)
    return ControlNet(
        "blockwise",
        partial(BlockwiseControlNet, layers, features, dim),
        inputs=(Input("control", torch.float32, (1, "image_tokens", features)), SCALE),
        condition="img_in",
        blocks={f"controlnet_blocks.{index}": (f"transformer_blocks.{index}", 0) for index in range(layers)},
        takes=taken,
        needs=taken,
    )
