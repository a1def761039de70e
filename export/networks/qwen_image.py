"""The Qwen-Image transformer, cut into what runs per prompt, per schedule and per step.

Source: ``QwenImageTransformer2DModel`` of diffusers 0.42 (tanh-approximate GELU). The time embedding and all modulation
linears depend on the schedule alone: they are no part of the graph, their results come in as a table
(``zimgkit.runtime.diffusion.modulation``).

A network's ``forward`` only calls its children; each kind of child is traced once, see ``zimgkit.export.graphs.trace``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zimgkit.engines.decoding import Even, Small, Width, decoded
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.layers import Tables, attention, rotate, split_heads
from zimgkit.export.networks.parts import Cut, Input, Part, Shapes, stored_shapes

FILE = "transformer/config.json"
MODULATIONS = 6
"""Rows of the modulation table per block and stream: shift, scale, gate, twice."""


class Config(msgspec.Struct, frozen=True):
    """What of ``transformer/config.json`` makes the networks."""

    num_layers: Small
    num_attention_heads: Small
    attention_head_dim: Small
    in_channels: Width
    out_channels: Small
    joint_attention_dim: Width
    axes_dims_rope: tuple[Even, ...]
    patch_size: int = 2
    guidance_embeds: bool = False
    zero_cond_t: bool = False
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False

    @property
    def width(self) -> int:
        """Of both streams."""
        return self.num_attention_heads * self.attention_head_dim


def read_config(config: Mapping[str, Any]) -> Config:
    """Read a transformer's config.

    Raises:
        CheckpointError: it is of no network that is implemented here; naming the key and what is supported.
    """
    found = decoded(config, Config, FILE, CheckpointError)
    for key, value in {"patch_size": 2, "guidance_embeds": False}.items():
        if getattr(found, key) != value:
            raise CheckpointError(f"{FILE} has {key} = {config[key]!r}; zimgkit supports {value!r} only")
    if sum(found.axes_dims_rope) != found.attention_head_dim:
        raise CheckpointError(f"{FILE}: axes_dims_rope do not add up to attention_head_dim")
    return found


class JointAttention(nn.Module):
    """Attention over text and image together, each with its own projections."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (
            nn.Linear(dim, dim),
            nn.Linear(dim, dim),
            nn.Linear(dim, dim),
        )
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_add_out = nn.Linear(dim, dim)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim, eps=1e-6), nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_added_q, self.norm_added_k = nn.RMSNorm(head_dim, eps=1e-6), nn.RMSNorm(head_dim, eps=1e-6)

    def forward(
        self, image: Tensor, text: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(batch, tokens, dim) of each stream, tables (batch, text + image tokens, head_dim / 2) -> both streams.

        A mask is bool (1, 1, all tokens, all tokens), whether a token, in rows, sees another.
        """

        def heads(x: Tensor) -> Tensor:
            return split_heads(x, self.head_dim)

        def joint(text_part: Tensor, image_part: Tensor) -> Tensor:
            return torch.cat([text_part, image_part], dim=1)

        query = joint(self.norm_added_q(heads(self.add_q_proj(text))), self.norm_q(heads(self.to_q(image))))
        key = joint(self.norm_added_k(heads(self.add_k_proj(text))), self.norm_k(heads(self.to_k(image))))
        value = heads(joint(self.add_v_proj(text), self.to_v(image)))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = attention(rotate(query, cos, sin), rotate(key, cos, sin), value, mask)
        tokens = text.shape[1]
        return self.to_out[0](out[:, tokens:]), self.to_add_out(out[:, :tokens])


class GELU(nn.Module):
    """A linear and the tanh-approximate GELU, under the checkpoint's names."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., hidden)."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """dim -> 4 dim -> dim."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GELU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        out: Tensor = self.net(x)
        return out


def modulate(x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """Layer norm without weights, then factor and shift by rows (1, dim)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * factor + shift


class QwenImageBlock(nn.Module):
    """A dual-stream block. Its modulation rows come in; ``img_mod`` and ``txt_mod`` are not part of it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim = config.width
        self.attn = JointAttention(dim, config.attention_head_dim)
        self.img_mlp, self.txt_mlp = FeedForward(dim), FeedForward(dim)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        image_rows: Tensor,
        text_rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both streams (batch, tokens, dim), rows (6, dim) each, tables (batch, all tokens, head_dim / 2), a mask."""
        return self._streams(image, text, image_rows.chunk(MODULATIONS), text_rows.chunk(MODULATIONS), cos, sin, mask)

    def _streams(
        self,
        image: Tensor,
        text: Tensor,
        image_mod: Sequence[Tensor],
        text_mod: Sequence[Tensor],
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        image_out, text_out = self.attn(modulate(image, *image_mod[:2]), modulate(text, *text_mod[:2]), cos, sin, mask)
        image = image + image_mod[2] * image_out
        text = text + text_mod[2] * text_out
        image = image + image_mod[5] * self.img_mlp(modulate(image, *image_mod[3:5]))
        text = text + text_mod[5] * self.txt_mlp(modulate(text, *text_mod[3:5]))
        return image, text


class ModulationRows(nn.Module):
    """One step's row of the modulation table in the network's element type, a scale s in it become the factor 1 + s."""

    def forward(self, modulation: Tensor, image: Tensor) -> Tensor:
        """(12 layers + 2, dim) float32, (batch, tokens, dim) -> (12 layers + 2, dim)."""
        row = torch.arange(modulation.shape[0], device=modulation.device)
        head = modulation.shape[0] - 2
        # Shift, scale, gate, twice; the head's two rows are scale, shift.
        is_scale = torch.where(row < head, row % 3 == 1, row == head)
        return (modulation + is_scale[:, None].float()).to(image.dtype)


class SplitModulation(nn.Module):
    """Those rows, cut into six for each stream of each block and two for the head."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.sizes = [MODULATIONS] * (2 * layers) + [2]

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        """(12 layers + 2, dim) -> 2 layers of (6, dim), then (2, dim)."""
        return rows.split(self.sizes)


class ImageEmbedding(nn.Linear):
    """Packed latents to tokens."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, tokens, 64) float32 -> (batch, tokens, dim)."""
        return super().forward(hidden_states.to(self.weight.dtype))


class Widen(nn.Module):
    """The prompt's tokens for each picture of the batch, in the element type the network computes in."""

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """(1, text tokens, dim) float32, (batch, ...) -> (batch, text tokens, dim)."""
        return text.to(image.dtype).expand(image.shape[0], -1, -1)


class Modulate(nn.Module):
    """Layer norm with the table's last two rows, scale first."""

    def forward(self, image: Tensor, rows: Tensor) -> Tensor:
        """(batch, tokens, dim), (2, dim) -> (batch, tokens, dim)."""
        factor, shift = rows.chunk(2)
        return modulate(image, shift, factor)


class OutputProjection(nn.Linear):
    """Tokens back to packed latents."""

    def forward(self, image: Tensor) -> Tensor:
        """(batch, tokens, dim) -> (batch, tokens, 64) float32."""
        return super().forward(image).float()


class QwenImageDenoiser(nn.Module):
    """Every step: packed latents, the prompt's tokens and the step's modulation -> velocity."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, layers = config.width, config.num_layers
        self.img_in = ImageEmbedding(config.in_channels, dim)
        self.transformer_blocks = nn.ModuleList(QwenImageBlock(config) for _ in range(layers))
        self.proj_out = OutputProjection(dim, 4 * config.out_channels)
        self.modulation_rows, self.split_modulation = ModulationRows(), SplitModulation(layers)
        self.norm_out = Modulate()
        self.widen, self.tables = Widen(), Tables()

    def forward(self, hidden_states: Tensor, text: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One forward.

        Args:
            hidden_states: (batch, image tokens, 64) float32.
            text: (1, text tokens, dim) float32 from the conditioner.
            modulation: (12 layers + 2, dim) float32, the step's row of the table.
            cos: (text tokens + image tokens, head_dim / 2) float32.
            sin: as ``cos``.

        Returns:
            (batch, image tokens, 64) float32.
        """
        image = self.img_in(hidden_states)
        rows = self.split_modulation(self.modulation_rows(modulation, image))
        return self.head(self.blocks(image, text, rows, cos, sin), rows)

    def blocks(
        self, image: Tensor, text: Tensor, rows: tuple[Tensor, ...], cos: Tensor, sin: Tensor, *more: Tensor
    ) -> Tensor:
        """All blocks on tokens of images, with what else their kind takes."""
        text = self.widen(text, image)
        cos, sin = self.tables(image, cos, sin)
        for index, block in enumerate(self.transformer_blocks):
            image, text = block(image, text, rows[2 * index], rows[2 * index + 1], cos, sin, *more)
        return image

    def head(self, image: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """The velocity of tokens."""
        out: Tensor = self.proj_out(self.norm_out(image, rows[2 * len(self.transformer_blocks)]))
        return out


class PromptNorm(nn.RMSNorm):
    """RMS norm of the text encoder's rows."""

    def forward(self, prompt_embeds: Tensor) -> Tensor:
        """(1, text tokens, joint_attention_dim) float32 -> the same shape."""
        return super().forward(prompt_embeds.to(self.weight.dtype))


class PromptEmbedding(nn.Linear):
    """Text-encoder rows to tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(1, text tokens, joint_attention_dim) -> (1, text tokens, dim) float32."""
        return super().forward(x).float()


class QwenImageConditioner(nn.Module):
    """Once per prompt: ``txt_norm`` and ``txt_in``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.txt_norm = PromptNorm(config.joint_attention_dim, eps=1e-6)
        self.txt_in = PromptEmbedding(config.joint_attention_dim, config.width)

    def forward(self, prompt_embeds: Tensor) -> Tensor:
        """(1, text tokens, joint_attention_dim) float32 -> (1, text tokens, dim) float32."""
        out: Tensor = self.txt_in(self.txt_norm(prompt_embeds))
        return out


def modulation_tensors(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors the modulation table is computed from, in the checkpoint's names."""
    dim = config.width
    linears = {
        "time_text_embed.timestep_embedder.linear_1": (dim, 256),
        "time_text_embed.timestep_embedder.linear_2": (dim, dim),
        "norm_out.linear": (2 * dim, dim),
    }
    for index in range(config.num_layers):
        for stream in ("img", "txt"):
            linears[f"transformer_blocks.{index}.{stream}_mod.1"] = (MODULATIONS * dim, dim)
    shapes: dict[str, tuple[int, ...]] = {}
    if config.use_additional_t_cond:
        shapes["time_text_embed.addition_t_embedding.weight"] = (2, dim)
    for name, (rows, columns) in linears.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)
    return shapes


def parts(config: Mapping[str, Any]) -> dict[str, Part]:
    """The components that the transformer becomes where it draws from text alone.

    Raises:
        CheckpointError: the config is of no network that zimgkit implements, or of one that takes pictures apart.
    """
    found = read_config(config)
    for key in ("use_additional_t_cond", "use_layer3d_rope"):
        if getattr(found, key):
            raise CheckpointError(f"{FILE} has {key} = True: it draws layers of a picture, and nothing from text alone")
    return every_part(found)


def every_part(found: Config) -> dict[str, Part]:
    """The components of any transformer, without variants."""
    dim, half = found.width, found.attention_head_dim // 2
    float32 = torch.float32
    conditioner = Part(
        "transformer",
        lambda: QwenImageConditioner(found),
        inputs=(Input("prompt_embeds", float32, (1, "text_tokens", found.joint_attention_dim)),),
        outputs=("text",),
        sizes=({"text_tokens": 34}, {"text_tokens": 55}),
    )
    denoiser = Part(
        "transformer",
        lambda: QwenImageDenoiser(found),
        inputs=(
            Input("hidden_states", float32, ("batch", "image_tokens", found.in_channels)),
            Input("text", float32, (1, "text_tokens", dim)),
            Input("modulation", float32, (2 * MODULATIONS * found.num_layers + 2, dim)),
            Input("cos", float32, ("all_tokens", half)),
            Input("sin", float32, ("all_tokens", half)),
        ),
        outputs=("velocity",),
        sizes=(
            {"batch": 2, "image_tokens": 65, "text_tokens": 34, "all_tokens": 99},
            {"batch": 3, "image_tokens": 77, "text_tokens": 55, "all_tokens": 132},
        ),
        cut=Cut(
            "transformer_blocks",
            ("target", "norm_out", "proj_out"),
            {
                "transformer_blocks": ("image", "text"),
                "modulation_rows": ("modulation_rows", "condition_modulation_rows"),
                "tables": ("wide_cos", "wide_sin"),
                "mask": ("wide_mask",),
            },
            repeated=("split_modulation",),
        ),
    )
    modulation = Part("transformer", shapes=modulation_tensors(found))
    return {"conditioner": conditioner, "modulation": modulation, "denoiser": denoiser}


def checkpoint_shapes(config: Mapping[str, Any]) -> Shapes:
    """The tensors of a whole transformer, by their names in a checkpoint, and their shapes."""
    return stored_shapes(every_part(read_config(config)))
