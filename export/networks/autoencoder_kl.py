"""``AutoencoderKL``: image-shaped latents of an eighth of the picture's size.

Source: ``AutoencoderKL`` of diffusers 0.42, after "High-Resolution Image Synthesis with Latent Diffusion Models"
(Rombach et al., 2022). All parameters are the checkpoint's own tensors. Scaling and shifting of latents is the host's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zimgkit.engines.decoding import Small, Width, decoded
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.layers import Border
from zimgkit.export.networks.parts import Part, Shapes
from zimgkit.export.networks.vae_blocks import (
    FILE,
    LEVELS,
    Chain,
    DownsampleConv,
    EntryConv,
    MidBlock,
    UpsampleConv,
    conv3x3,
    decoder_part,
    encoder_part,
    named,
    refuse_others,
    residual_blocks,
)


class Config(msgspec.Struct, frozen=True):
    """What of ``vae/config.json`` makes the networks; the defaults are those of diffusers, for older files."""

    block_out_channels: tuple[Width, ...]
    in_channels: Small = 3
    out_channels: Small = 3
    layers_per_block: Small = 1
    latent_channels: Small = 4
    norm_num_groups: Small = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    act_fn: str = "silu"
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * LEVELS
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * LEVELS


def read_config(config: Mapping[str, Any]) -> Config:
    """Read ``vae/config.json``.

    Raises:
        CheckpointError: naming the key that is not implemented or makes no network.
    """
    found = decoded(config, Config, FILE, CheckpointError)
    refuse_others(found, config, ("act_fn", "down_block_types", "up_block_types"))
    widths, groups = found.block_out_channels, found.norm_num_groups
    if len(widths) != LEVELS:
        raise CheckpointError(f"{FILE} has block_out_channels = {widths}; zimgkit supports {LEVELS} levels only")
    if any(width % groups for width in widths):
        raise CheckpointError(f"{FILE} has norm_num_groups = {groups}, which does not divide {widths}")
    return found


class GroupNorm(nn.GroupNorm):
    """Group normalization in float32, as ONNX ``InstanceNormalization`` of whole groups and a scale and shift.

    ONNX Runtime runs ``GroupNormalization`` as E[x²] - E[x]², in several passes: of inputs whose mean is 10 standard
    deviations it gets 2e-4 wrong where this gets 5e-6, and a decode takes 6 % longer.
    """

    def __init__(self, num_groups: int, num_channels: int) -> None:
        super().__init__(num_groups, num_channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> the same."""
        # The width stays an axis of its own, so that both Reshapes have a constant target, such as [0, groups, -1, 0].
        grouped = x.float().reshape(x.shape[0], self.num_groups, -1, x.shape[3])
        normalized = F.instance_norm(grouped, eps=self.eps).reshape(x.shape)
        scale, shift = (parameter.float().reshape(-1, 1, 1) for parameter in (self.weight, self.bias))
        return (normalized * scale + shift).to(x.dtype)


class PixelAttention(nn.Module):
    """Single-head self-attention of all pixels."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(num_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> the same."""
        batch, channels = x.shape[:2]
        tokens = self.group_norm(x).reshape(batch, 1, channels, -1).transpose(2, 3)
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out(out).transpose(2, 3).reshape(x.shape)


class AutoencoderKLDecoder(Chain):
    """Latents to pictures."""

    def __init__(self, config: Config) -> None:
        widths, channels = list(config.block_out_channels)[::-1], config.latent_channels
        norm = partial(GroupNorm, config.norm_num_groups)
        up_blocks = [
            named(
                resnets=residual_blocks(config.layers_per_block + 1, before, width, norm),
                upsamplers=nn.Sequential(UpsampleConv(width, width, "conv")) if level < LEVELS - 1 else None,
            )
            for level, (before, width) in enumerate(pairwise([widths[0], *widths]))
        ]
        decoder = named(
            conv_in=EntryConv(channels, widths[0], 3, padding=1),
            mid_block=_mid_block(config),
            up_blocks=nn.Sequential(*up_blocks),
            conv_norm_out=norm(widths[-1]),
            conv_act=nn.SiLU(),
            conv_out=conv3x3(widths[-1], config.out_channels),
        )
        post_quant_conv = EntryConv(channels, channels, 1) if config.use_post_quant_conv else None
        super().__init__(post_quant_conv=post_quant_conv, decoder=decoder, border=Border())

    def forward(self, latents: Tensor) -> Tensor:
        """Decode.

        Args:
            latents: (batch, latent_channels, h, w) float32, as the encoder gives them, without scale or shift.

        Returns:
            (batch, out_channels, 8h, 8w) float32, about -1 to 1, not clamped.
        """
        return super().forward(latents)


class AutoencoderKLEncoder(Chain):
    """Pictures to the moments of their latents."""

    def __init__(self, config: Config) -> None:
        widths, moments = list(config.block_out_channels), 2 * config.latent_channels
        norm = partial(GroupNorm, config.norm_num_groups)
        down_blocks = [
            named(
                resnets=residual_blocks(config.layers_per_block, before, width, norm),
                downsamplers=nn.Sequential(DownsampleConv(width, "conv")) if level < LEVELS - 1 else None,
            )
            for level, (before, width) in enumerate(pairwise([widths[0], *widths]))
        ]
        encoder = named(
            conv_in=EntryConv(config.in_channels, widths[0], 3, padding=1),
            down_blocks=nn.Sequential(*down_blocks),
            mid_block=_mid_block(config),
            conv_norm_out=norm(widths[-1]),
            conv_act=nn.SiLU(),
            conv_out=conv3x3(widths[-1], moments),
        )
        quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else None
        super().__init__(encoder=encoder, quant_conv=quant_conv, border=Border())

    def forward(self, image: Tensor) -> Tensor:
        """Encode.

        Args:
            image: (batch, in_channels, height, width) float32, -1 to 1; sides are multiples of 8.

        Returns:
            (batch, 2 * latent_channels, height / 8, width / 8) float32: means, then logarithms of variances.
        """
        return super().forward(image)


def _mid_block(config: Config) -> MidBlock:
    width, groups = config.block_out_channels[-1], config.norm_num_groups
    attention = PixelAttention(width, groups) if config.mid_block_add_attention else None
    return MidBlock(width, partial(GroupNorm, groups), attention)


def parts(config: Mapping[str, Any]) -> dict[str, Part]:
    """The components that the autoencoder becomes.

    Raises:
        CheckpointError: the config is of no network that zimgkit implements.
    """
    found = read_config(config)
    return {
        "vae_encoder": encoder_part(lambda: AutoencoderKLEncoder(found), found.in_channels),
        "vae_decoder": decoder_part(lambda: AutoencoderKLDecoder(found), found.latent_channels),
    }


def halves(config: Mapping[str, Any]) -> tuple[AutoencoderKLEncoder, AutoencoderKLDecoder]:
    """Encoder and decoder.

    Raises:
        CheckpointError: the config is of no network that zimgkit implements.
    """
    found = read_config(config)
    return AutoencoderKLEncoder(found), AutoencoderKLDecoder(found)


def checkpoint_shapes(config: Mapping[str, Any]) -> Shapes:
    """The tensors of a whole autoencoder, by their names in a checkpoint, and their shapes."""
    with torch.device("meta"):
        both = halves(config)
    return {name: tuple(value.shape) for half in both for name, value in half.state_dict().items()}
