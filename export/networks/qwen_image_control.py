"""ControlNets of Qwen-Image.

Source: ``QwenImageBlockWiseControlNet`` of DiffSynth-Studio 2.1 (after each of the transformer's blocks a net of two
linears reads its image tokens and those of a picture, and adds to the former), and ``QwenImageControlNetModel`` of
diffusers 0.42 (a few blocks beside the transformer, which read the positive prompt in both branches of guidance).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.layers import Tables, weight_dtype
from zimgkit.export.networks.parts import SCALE, ControlNet, Input
from zimgkit.export.networks.qwen_image import (
    MODULATIONS,
    Config,
    ImageEmbedding,
    PromptEmbedding,
    PromptNorm,
    QwenImageBlock,
    QwenImageDenoiser,
    Widen,
    read_config,
)

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
    layers = _count(shapes, "controlnet_blocks")
    if (layers, dim) != (transformer.num_layers, transformer.width):
        has = f"it has {layers} blocks of width {dim}"
        hint = "name a net of this model"
        raise CheckpointError(f"{has}, and the transformer {transformer.num_layers} of {transformer.width}", hint)
    taken = _taken(features, transformer)
    return ControlNet(
        "blockwise",
        partial(BlockwiseControlNet, layers, features, dim),
        inputs=(Input("control", torch.float32, (1, "image_tokens", features)), SCALE),
        condition="img_in",
        blocks={f"controlnet_blocks.{index}": (f"transformer_blocks.{index}", 0) for index in range(layers)},
        takes=taken,
        needs=taken,
    )


def _count(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    """How many modules a list of modules has."""
    return len({key.split(".")[1] for key in shapes if key.startswith(f"{name}.")})


def _taken(features: int, transformer: Config) -> tuple[str, ...]:
    """The pictures that a net needs, by the features of a token that it takes.

    Raises:
        CheckpointError: it is no number of them that is known.
    """
    masked = features - transformer.in_channels
    if masked not in (0, MASK_FEATURES):
        takes = f"{transformer.in_channels} or {transformer.in_channels + MASK_FEATURES}"
        raise CheckpointError(f"its tokens have {features} features", f"zimgkit knows nets of {takes}")
    return ("image", "mask") if masked else ("image",)


class TimeEmbedding(nn.Module):
    """The time embedding that a net's blocks share, from the sinusoids that the host computes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(256, dim), nn.Linear(dim, dim)

    def forward(self, sinusoids: Tensor) -> Tensor:
        """(1, 256) float32 -> (1, dim)."""
        x: Tensor = self.linear_2(F.silu(self.linear_1(sinusoids.to(weight_dtype(self)))))
        return x


class TimedBlock(QwenImageBlock):
    """A block with its own modulation, which no table holds."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        rows = MODULATIONS * config.width
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(config.width, rows))
        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(config.width, rows))

    def forward(  # type: ignore[override]
        self, image: Tensor, text: Tensor, time: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both streams (batch, tokens, dim), time (1, dim), tables (batch, all tokens, head_dim / 2)."""

        def rows(modulation: nn.Module) -> list[Tensor]:
            shift, scale, gate, shift_2, scale_2, gate_2 = modulation(time).chunk(MODULATIONS, dim=-1)
            return [shift, scale + 1, gate, shift_2, scale_2 + 1, gate_2]

        return self._streams(image, text, rows(self.img_mod), rows(self.txt_mod), cos, sin, None)


class JoinCondition(nn.Module):
    """Tokens of what is drawn and of a picture."""

    def forward(self, image: Tensor, control: Tensor) -> Tensor:
        """(batch, tokens, dim), (1, tokens, dim) -> (batch, tokens, dim)."""
        return image + control


class AddResidual(nn.Module):
    """What a net's block gives, as strong as was asked for."""

    def forward(self, image: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
        """(batch, tokens, dim), likewise, (1,) float32 -> (batch, tokens, dim)."""
        return image + residual * scale.to(residual.dtype)


class ResidualControlNet(nn.Module):
    """Blocks beside the transformer's, and what their tokens become before they are added there."""

    def __init__(self, config: Config, layers: int, features: int) -> None:
        super().__init__()
        dim = config.width
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": TimeEmbedding(dim)})
        self.txt_norm = PromptNorm(config.joint_attention_dim, eps=1e-6)
        self.img_in = ImageEmbedding(config.in_channels, dim)
        self.txt_in = PromptEmbedding(config.joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(TimedBlock(config) for _ in range(layers))
        self.controlnet_blocks = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.controlnet_x_embedder = ControlEmbedding(features, dim)


class ControlledDenoiser(QwenImageDenoiser):
    """Every step, beside such a net, whose parameters are named ``control.<name>``."""

    def __init__(self, config: Config, layers: int, features: int, name: str) -> None:
        super().__init__(config)
        self.name, self.interval = name, -(-config.num_layers // layers)
        self.control = nn.ModuleDict({name: ResidualControlNet(config, layers, features)})
        self.join_condition, self.add_residual = JoinCondition(), AddResidual()
        self.control_widen, self.control_tables = Widen(), Tables()

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        text: Tensor,
        modulation: Tensor,
        cos: Tensor,
        sin: Tensor,
        control: Tensor,
        prompt_embeds: Tensor,
        control_cos: Tensor,
        control_sin: Tensor,
        sinusoids: Tensor,
        scale: Tensor,
    ) -> Tensor:
        """As the base class, with inputs more.

        Args:
            hidden_states: (batch, image tokens, 64) float32.
            text: (1, text tokens, dim) float32.
            modulation: (12 layers + 2, dim) float32.
            cos: (text tokens + image tokens, head_dim / 2) float32.
            sin: as ``cos``.
            control: (1, image tokens, 64 or 68) float32, packed latents of a picture.
            prompt_embeds: (1, control text tokens, joint_attention_dim) float32, rows of the positive prompt.
            control_cos: (control text tokens + image tokens, head_dim / 2) float32.
            control_sin: likewise.
            sinusoids: (1, 256) float32, of the noise level.
            scale: (1,) float32.

        Returns:
            (batch, image tokens, 64) float32.
        """
        net: Any = self.control[self.name]
        x = self.join_condition(net.img_in(hidden_states), net.controlnet_x_embedder(control))
        time = net.time_text_embed["timestep_embedder"](sinusoids)
        prompt = self.control_widen(net.txt_in(net.txt_norm(prompt_embeds)), x)
        control_cos, control_sin = self.control_tables(x, control_cos, control_sin)
        residuals = []
        for block, projection in zip(net.transformer_blocks, net.controlnet_blocks, strict=True):
            x, prompt = block(x, prompt, time, control_cos, control_sin)
            residuals.append(projection(x))
        image = self.img_in(hidden_states)
        rows = self.split_modulation(self.modulation_rows(modulation, image))
        text = self.widen(text, image)
        cos, sin = self.tables(image, cos, sin)
        for index, block in enumerate(self.transformer_blocks):
            image, text = block(image, text, rows[2 * index], rows[2 * index + 1], cos, sin)
            image = self.add_residual(image, residuals[index // self.interval], scale)
        return self.head(image, rows)


def residual(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], own: Mapping[str, Any]) -> ControlNet:
    """The nets of InstantX, Union among them; with 68 features they take a mask, and need it.

    Raises:
        CheckpointError: the net is of another width, or has more blocks than the transformer.
    """
    transformer = read_config(config)
    dim, features = shapes["controlnet_x_embedder.weight"]
    layers = _count(shapes, "controlnet_blocks")
    if dim != transformer.width or not 0 < layers <= transformer.num_layers:
        has = f"it has {layers} blocks of width {dim}"
        hint = "name a net of this model"
        raise CheckpointError(f"{has}, and the transformer {transformer.num_layers} of {transformer.width}", hint)
    taken, half = _taken(features, transformer), transformer.attention_head_dim // 2
    float32 = torch.float32
    return ControlNet(
        "residual",
        partial(ResidualControlNet, transformer, layers, features),
        inputs=(
            Input("control", float32, (1, "image_tokens", features)),
            Input("prompt_embeds", float32, (1, "control_text_tokens", transformer.joint_attention_dim)),
            Input("cos", float32, ("control_all_tokens", half)),
            Input("sin", float32, ("control_all_tokens", half)),
            Input("sinusoids", float32, (1, 256)),
            SCALE,
        ),
        sizes=(
            {"control_text_tokens": 37, "control_all_tokens": 102},
            {"control_text_tokens": 59, "control_all_tokens": 136},
        ),
        woven=partial(ControlledDenoiser, transformer, layers, features),
        takes=taken,
        needs=taken,
    )
