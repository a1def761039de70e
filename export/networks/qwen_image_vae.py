"""``AutoencoderKLQwenImage``, the autoencoder of Qwen-Image, in its exact two-dimensional form for one still image.

Source: ``AutoencoderKLQwenImage`` of diffusers 0.42, a video autoencoder after Wan 2.1. Its convolutions are causal in
time: before the first frame they see zeros. So of each 3x3x3 kernel only the last temporal slice acts on a still image,
a 3x3 kernel, and the convolutions along time (``time_conv``) never run. Normalizing latents is the host's.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from zimgkit.engines.decoding import Small, decoded
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
    """What of ``vae/config.json`` makes the networks; the defaults are those of diffusers."""

    base_dim: Small = 96
    z_dim: Small = 16
    dim_mult: tuple[Small, ...] = (1, 2, 4, 4)
    num_res_blocks: Small = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    """The key's real name."""
    input_channels: Small = 3
    attn_scales: tuple[float, ...] = ()
    # These are of later video autoencoders of this family.
    is_residual: bool = False
    patch_size: int | None = None
    decoder_base_dim: int | None = None


def read_config(config: Mapping[str, Any]) -> Config:
    """Read ``vae/config.json``.

    Raises:
        CheckpointError: naming the key that is not implemented or makes no network.
    """
    found = decoded(config, Config, FILE, CheckpointError)
    refuse_others(found, config, ("attn_scales", "is_residual", "patch_size", "decoder_base_dim"))
    for key, length in (("dim_mult", LEVELS), ("temperal_downsample", LEVELS - 1)):
        if len(getattr(found, key)) != length:
            raise CheckpointError(f"{FILE} has {key} = {config[key]!r}; zimgkit supports {length} entries only")
    return found


class ChannelNorm(nn.Module):
    """RMS normalization of each pixel over its channels, in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> the same."""
        channels = x.shape[1]
        wide = x.float()
        # A mean over channels, written as a 1x1 convolution: ONNX Runtime reduces this axis on one core only.
        weight = torch.full((1, channels, 1, 1), 1 / channels, device=x.device)
        mean_square = F.conv2d(wide * wide, weight)
        # The bound is the reference's, 1e-12 on the norm: an all-zero pixel stays zero.
        rms = mean_square.clamp_min(1e-24 / channels).sqrt()
        return (wide / rms).to(x.dtype) * self.gamma


class PixelAttention(nn.Module):
    """Single-head self-attention of all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> the same."""
        batch, channels = x.shape[:2]
        qkv = self.to_qkv(self.norm(x)).reshape(batch, 1, 3 * channels, -1).transpose(2, 3)
        out = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        return x + self.proj(out.transpose(2, 3).reshape(x.shape))


class QwenImageVAEDecoder(Chain):
    """Latents to pictures."""

    def __init__(self, config: Config) -> None:
        channels, blocks = config.z_dim, config.num_res_blocks + 1
        widths = [config.base_dim * factor for factor in config.dim_mult][::-1]
        up_blocks = []
        # Each upsampler hands on half of its channels.
        for level, (before, width) in enumerate(zip([2 * widths[0], *widths], widths, strict=False)):
            upsample = named(resample=UpsampleConv(width, width // 2, "1")) if level < len(widths) - 1 else None
            up_blocks.append(
                named(
                    resnets=residual_blocks(blocks, before // 2, width, ChannelNorm),
                    upsamplers=nn.Sequential(upsample) if upsample else None,
                )
            )
        decoder = named(
            conv_in=conv3x3(channels, widths[0]),
            mid_block=MidBlock(widths[0], ChannelNorm, PixelAttention(widths[0])),
            up_blocks=nn.Sequential(*up_blocks),
            norm_out=ChannelNorm(widths[-1]),
            nonlinearity=nn.SiLU(),
            conv_out=conv3x3(widths[-1], config.input_channels),
        )
        super().__init__(post_quant_conv=EntryConv(channels, channels, 1), decoder=decoder, border=Border())

    def forward(self, latents: Tensor) -> Tensor:
        """Decode.

        Args:
            latents: (batch, z_dim, h, w) float32, as the encoder gives them, not normalized.

        Returns:
            (batch, input_channels, 8h, 8w) float32, about -1 to 1, not clamped.
        """
        return super().forward(latents)


class QwenImageVAEEncoder(Chain):
    """Pictures to the moments of their latents."""

    def __init__(self, config: Config) -> None:
        moments = 2 * config.z_dim
        widths = [config.base_dim * factor for factor in config.dim_mult]
        # Residual blocks and downsamplers stand in one flat list.
        down_blocks: list[nn.Module] = []
        for before, width in pairwise([config.base_dim, *widths]):
            if down_blocks:
                down_blocks.append(named(resample=DownsampleConv(before, "1")))
            down_blocks.extend(residual_blocks(config.num_res_blocks, before, width, ChannelNorm))
        encoder = named(
            conv_in=EntryConv(config.input_channels, config.base_dim, 3, padding=1),
            down_blocks=nn.Sequential(*down_blocks),
            mid_block=MidBlock(widths[-1], ChannelNorm, PixelAttention(widths[-1])),
            norm_out=ChannelNorm(widths[-1]),
            nonlinearity=nn.SiLU(),
            conv_out=conv3x3(widths[-1], moments),
        )
        super().__init__(encoder=encoder, quant_conv=nn.Conv2d(moments, moments, 1), border=Border())

    def forward(self, image: Tensor) -> Tensor:
        """Encode.

        Args:
            image: (batch, input_channels, height, width) float32, -1 to 1; sides are multiples of 8.

        Returns:
            (batch, 2 * z_dim, height / 8, width / 8) float32: means, then logarithms of variances.
        """
        return super().forward(image)


def last_slice(tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a tensor of the video autoencoder is for a still image: the last entry of its axis 2, which is time."""
    return tensor[:, :, -1]


def only_slice(tensor: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A tensor of the video autoencoder whose last entry along time is this one; before it there are zeros."""
    whole = np.zeros(shape, tensor.dtype)
    whole[:, :, -1] = tensor
    return whole


def video_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The parameters that :func:`last_slice` makes, with their shapes in the checkpoint.

    Kernels have a temporal axis there, (out, in, k, k, k), and so have gammas, (channels, 1, 1, 1). The attention and
    the convolutions of the resamplers are two-dimensional already.
    """
    return {
        name: (*value.shape[:2], value.shape[2], *value.shape[2:])
        for name, value in network.state_dict().items()
        if value.ndim > 1 and "attentions." not in name and ".resample." not in name
    }


def parts(config: Mapping[str, Any]) -> dict[str, Part]:
    """The components that the autoencoder becomes.

    Raises:
        CheckpointError: the config is of no network that zimgkit implements.
    """
    found = read_config(config)
    with torch.device("meta"):
        encoder, decoder = (video_shapes(half) for half in halves(config))
    return {
        "vae_encoder": encoder_part(
            lambda: QwenImageVAEEncoder(found), found.input_channels, last_slice, encoder, only_slice
        ),
        "vae_decoder": decoder_part(lambda: QwenImageVAEDecoder(found), found.z_dim, last_slice, decoder, only_slice),
    }


def halves(config: Mapping[str, Any]) -> tuple[QwenImageVAEEncoder, QwenImageVAEDecoder]:
    """Encoder and decoder.

    Raises:
        CheckpointError: the config is of no network that zimgkit implements.
    """
    found = read_config(config)
    return QwenImageVAEEncoder(found), QwenImageVAEDecoder(found)


def checkpoint_shapes(config: Mapping[str, Any]) -> Shapes:
    """The tensors of a whole autoencoder with its temporal axes and convolutions, by their names in a checkpoint."""
    with torch.device("meta"):
        encoder, decoder = halves(config)
    shapes: Shapes = {}
    # Upsamplers stand in the reverse order of downsamplers, and make two frames of one.
    for half, temporal, frames in ((encoder, 1, 1), (decoder, -1, 2)):
        shapes |= {name: tuple(value.shape) for name, value in half.state_dict().items()}
        shapes |= video_shapes(half)
        resamplers = [name.removesuffix("resample.1.weight") for name in shapes if name.endswith("resample.1.weight")]
        own = [name for name in resamplers if name.startswith("encoder" if half is encoder else "decoder")]
        for name, is_temporal in zip(own, read_config(config).temperal_downsample[::temporal], strict=True):
            if is_temporal:
                channels = shapes[f"{name}resample.1.weight"][1]
                shapes[f"{name}time_conv.weight"] = (frames * channels, channels, 3, 1, 1)
                shapes[f"{name}time_conv.bias"] = (frames * channels,)
    return shapes
