from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimg.export.models.vae_blocks import Downsample, MidBlock, ResidualBlock, Upsample, conv3x3


class GroupNorm(nn.GroupNorm):
    def __init__(self, num_groups: int, num_channels: int) -> None:
        super().__init__(num_groups, num_channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y = F.instance_norm(x.float().reshape(x.shape[0], self.num_groups, -1), eps=self.eps).reshape(x.shape)
        shape = (-1,) + (1,) * (x.dim() - 2)
        return (y * self.weight.reshape(shape) + self.bias.reshape(shape)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, channels: int, norm_num_groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(norm_num_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)
        y = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        y = self.to_out[0](y)
        return x + y.transpose(2, 3).reshape(x.shape)


class UpsampleConv(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = conv3x3(channels, channels)
        self.up = Upsample()

    def forward(self, x):
        return self.conv(self.up(x))


class DownsampleConv(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = Downsample(channels)

    def forward(self, x):
        return self.conv(x)


class UpBlock(nn.Module):
    def __init__(self, cin, cout, n, norm, up):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(cin if i == 0 else cout, cout, norm) for i in range(n))
        self.upsamplers = nn.ModuleList([UpsampleConv(cout)] if up else [])

    def forward(self, x):
        for m in (*self.resnets, *self.upsamplers):
            x = m(x)
        return x


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        ch = list(config["block_out_channels"])[::-1]
        norm = partial(GroupNorm, config["norm_num_groups"])
        self.conv_in = conv3x3(config["latent_channels"], ch[0])
        self.mid_block = MidBlock(ch[0], norm, Attention(ch[0], config["norm_num_groups"]))
        self.up_blocks = nn.ModuleList(
            UpBlock(ch[max(i - 1, 0)], c, config["layers_per_block"] + 1, norm, i + 1 < len(ch)) for i, c in enumerate(ch)
        )
        self.conv_norm_out = norm(ch[-1])
        self.conv_out = conv3x3(ch[-1], config["out_channels"])

    def forward(self, x):
        x = self.mid_block(self.conv_in(x))
        for b in self.up_blocks:
            x = b(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKLDecoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.decoder = Decoder(config)

    def forward(self, latents):
        return self.decoder(latents)
