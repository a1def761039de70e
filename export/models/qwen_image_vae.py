from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimg.export.models.vae_blocks import Downsample, MidBlock, ResidualBlock, Upsample, conv3x3


class ChannelNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        c = x.shape[1]
        ones = torch.full((1, c), 1.0 / c, device=x.device)
        ms = (ones @ wide.square().flatten(2)).clamp_min(1e-24 / c)
        y = wide * ms.rsqrt().reshape(x.shape[0], 1, x.shape[2], x.shape[3])
        return y.to(x.dtype) * self.gamma


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)
        y = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        return x + self.proj(y.transpose(2, 3).reshape(x.shape))


class Up(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.resample = nn.Sequential(Upsample(), conv3x3(cin, cout))

    def forward(self, x):
        return self.resample(x)


class UpBlock(nn.Module):
    def __init__(self, cin, cout, n, up):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(cin if i == 0 else cout, cout, ChannelNorm) for i in range(n))
        self.upsamplers = nn.ModuleList([Up(cout, cout // 2)] if up else [])

    def forward(self, x):
        for m in (*self.resnets, *self.upsamplers):
            x = m(x)
        return x


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        mult = config["dim_mult"]
        dims = [config["base_dim"] * u for u in [mult[-1], *mult[::-1]]]
        self.conv_in = conv3x3(config["z_dim"], dims[0])
        self.mid_block = MidBlock(dims[0], ChannelNorm, Attention(dims[0]))
        n = len(mult)
        self.up_blocks = nn.ModuleList(
            UpBlock(dims[i] // (2 if i else 1), dims[i + 1], config["num_res_blocks"] + 1, i + 1 < n) for i in range(n)
        )
        self.norm_out = ChannelNorm(dims[-1])
        self.conv_out = conv3x3(dims[-1], config["input_channels"])

    def forward(self, x):
        x = self.mid_block(self.conv_in(x))
        for b in self.up_blocks:
            x = b(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class QwenImageVAEDecoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.post_quant_conv = nn.Conv2d(config["z_dim"], config["z_dim"], 1)
        self.decoder = Decoder(config)

    def forward(self, latents):
        return self.decoder(self.post_quant_conv(latents))
