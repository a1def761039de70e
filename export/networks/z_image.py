"""The Z-Image transformer, cut into what runs once per prompt and what runs every step.

Source: ``ZImageTransformer2DModel`` of diffusers 0.42 and the official Tongyi-MAI/Z-Image repository. Patchifying,
padding to multiples of 32 tokens, position ids and RoPE tables live on the host (``zimgkit.runtime``).

A network's ``forward`` only calls its children; each kind of child is traced once, see ``zimgkit.export.graphs.trace``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zimgkit.engines.decoding import Even, Positive, Small, Width, decoded
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.layers import Border, Tables, attention, rotate, split_heads, weight_dtype
from zimgkit.export.networks.parts import Cut, Input, Part, Shapes, stored_shapes

FILE = "transformer/config.json"
MODULATION_WIDTH = 256
"""Width of the time embedding that modulates the blocks; fixed in the reference code."""


class Config(msgspec.Struct, frozen=True):
    """What of ``transformer/config.json`` makes the networks."""

    dim: Width
    n_heads: Small
    n_kv_heads: Small
    n_layers: Small
    n_refiner_layers: Annotated[int, msgspec.Meta(ge=0, le=1024)]
    in_channels: Small
    cap_feat_dim: Width
    norm_eps: Positive
    axes_dims: tuple[Even, ...]
    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    qk_norm: bool = True
    siglip_feat_dim: Width | None = None


def read_config(config: Mapping[str, Any]) -> Config:
    """Read a transformer's config.

    Raises:
        CheckpointError: it is of no network that is implemented here; naming the key and what is supported.
    """
    found = decoded(config, Config, FILE, CheckpointError)
    wanted = {"all_patch_size": (2,), "all_f_patch_size": (1,), "qk_norm": True}
    for key, value in wanted.items():
        if getattr(found, key) != value:
            raise CheckpointError(f"{FILE} has {key} = {config[key]!r}; zimgkit supports {value!r} only")
    if found.n_kv_heads != found.n_heads:
        raise CheckpointError(f"{FILE} has n_kv_heads unlike n_heads; zimgkit supports equal numbers only")
    if sum(found.axes_dims) * found.n_heads != found.dim:
        raise CheckpointError(f"{FILE}: axes_dims do not add up to dim / n_heads")
    return found


class Attention(nn.Module):
    """Self-attention with RMS-normed queries and keys and no biases."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-5)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, tokens, dim) with (batch, tokens, head_dim / 2) tables -> (batch, tokens, dim)."""
        query = self.norm_q(split_heads(self.to_q(x), self.head_dim)).transpose(1, 2)
        key = self.norm_k(split_heads(self.to_k(x), self.head_dim)).transpose(1, 2)
        value = split_heads(self.to_v(x), self.head_dim).transpose(1, 2)
        out: Tensor = self.to_out[0](attention(rotate(query, cos, sin), rotate(key, cos, sin), value))
        return out


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(dim / 3 * 8)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class _Block(nn.Module):
    """What both kinds of block hold: attention and feed-forward, each between two norms."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.attention = Attention(dim, dim // config.n_heads)
        self.feed_forward = FeedForward(dim)
        self.attention_norm1 = nn.RMSNorm(dim, eps=eps)
        self.attention_norm2 = nn.RMSNorm(dim, eps=eps)
        self.ffn_norm1 = nn.RMSNorm(dim, eps=eps)
        self.ffn_norm2 = nn.RMSNorm(dim, eps=eps)


class ZImageBlock(_Block):
    """A block whose norms and residuals are modulated by the time embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width = min(config.dim, MODULATION_WIDTH)
        self.adaLN_modulation = nn.Sequential(nn.Linear(width, 4 * config.dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, time_embedding: Tensor) -> Tensor:
        """(batch, tokens, dim), tables (batch, tokens, head_dim / 2), (1, width) -> (batch, tokens, dim)."""
        return self._modulated(x, cos, sin, self._modulation(time_embedding))

    def _modulation(self, time_embedding: Tensor) -> Sequence[Tensor]:
        """(1, width) -> four of (1, 1, dim)."""
        return self.adaLN_modulation(time_embedding).unsqueeze(1).chunk(4, dim=2)

    def _modulated(self, x: Tensor, cos: Tensor, sin: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        scale_attention, gate_attention, scale_ffn, gate_ffn = modulation
        out = self.attention(self.attention_norm1(x) * (1 + scale_attention), cos, sin)
        x = x + gate_attention.tanh() * self.attention_norm2(out)
        out = self.feed_forward(self.ffn_norm1(x) * (1 + scale_ffn))
        return x + gate_ffn.tanh() * self.ffn_norm2(out)


class ZImageContextBlock(_Block):
    """A block of the context refiner: no modulation, so it runs once per prompt."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, tokens, dim), tables (batch, tokens, head_dim / 2) -> (batch, tokens, dim)."""
        x = x + self.attention_norm2(self.attention(self.attention_norm1(x), cos, sin))
        return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))


class PatchEmbedding(nn.Linear):
    """Latent patches to tokens."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, tokens, 64) float32 -> (batch, tokens, dim)."""
        return super().forward(hidden_states.to(self.weight.dtype))


class PadRows(nn.Module):
    """Replace the rows that only fill up a multiple of 32 tokens by the learned pad token.

    The parameter belongs to the network (``x_pad_token``), whose name the checkpoint has, so it comes as an input.
    """

    def forward(self, x: Tensor, pad: Tensor, token: Tensor) -> Tensor:
        """(batch, tokens, dim), (tokens,) bool with True at pads, (1, dim) -> (batch, tokens, dim)."""
        return torch.where(pad[:, None], token, x)


class TimeEmbedding(nn.Module):
    """The time embedding all modulated blocks share, from the sinusoids the host computes."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, 1024), nn.SiLU(), nn.Linear(1024, out_features))

    def forward(self, sinusoids: Tensor) -> Tensor:
        """(1, 256) float32 -> (1, width)."""
        return self.mlp(sinusoids.to(weight_dtype(self.mlp)))


class Leading(nn.Module):
    """The leading rows of a table, as many as ``x`` has tokens: the image comes before the caption.

    Gathered and not sliced: a slice ends where its source does, so compilers do not take its length for that of ``x``.
    """

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, tokens, dim), two (batch, all tokens, width) tables -> two (batch, tokens, width) tables."""
        rows = torch.arange(x.shape[1], device=x.device)
        return cos.index_select(1, rows), sin.index_select(1, rows)


class Join(nn.Module):
    """Image tokens, then caption tokens, which get the image's batch and element type."""

    def forward(self, image: Tensor, caption: Tensor) -> Tensor:
        """(batch, image tokens, dim), (1, caption tokens, dim) float32 -> (batch, all tokens, dim)."""
        return torch.cat([image, caption.to(image.dtype).expand(image.shape[0], -1, -1)], dim=1)


class FinalLayer(nn.Module):
    """Modulated norm and projection of the image tokens back to latent patches."""

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(min(dim, MODULATION_WIDTH), dim))

    def forward(self, x: Tensor, time_embedding: Tensor, pad: Tensor) -> Tensor:
        """(batch, all tokens, dim), (1, width), (image tokens,) -> (batch, image tokens, 64) float32."""
        x = x[:, : pad.shape[0]]
        scale = 1 + self.adaLN_modulation(time_embedding).unsqueeze(1)
        return self.linear(self.norm_final(x) * scale).float()


class ZImageDenoiser(nn.Module):
    """Every step: latent patches, time, the prompt's refined caption -> the network's output, the negated velocity."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, patch = config.dim, 4 * config.in_channels
        self.x_pad_token = nn.Parameter(torch.empty(1, dim))
        self.all_x_embedder = nn.ModuleDict({"2-1": PatchEmbedding(patch, dim)})
        self.t_embedder = TimeEmbedding(min(dim, MODULATION_WIDTH))
        self.noise_refiner = nn.ModuleList(ZImageBlock(config) for _ in range(config.n_refiner_layers))
        self.layers = nn.ModuleList(ZImageBlock(config) for _ in range(config.n_layers))
        self.all_final_layer = nn.ModuleDict({"2-1": FinalLayer(dim, patch)})
        self.pad_rows, self.tables, self.leading, self.join = PadRows(), Tables(), Leading(), Join()

    def forward(
        self, hidden_states: Tensor, sinusoids: Tensor, caption: Tensor, cos: Tensor, sin: Tensor, pad: Tensor
    ) -> Tensor:
        """One forward.

        Args:
            hidden_states: (batch, image tokens, 64) float32, image tokens a multiple of 32.
            sinusoids: (1, 256) float32, of the time 1 - sigma.
            caption: (1, caption tokens, dim) float32 from the conditioner.
            cos: (image tokens + caption tokens, head_dim / 2) float32.
            sin: as ``cos``.
            pad: (image tokens,) bool, True where a token only fills up the multiple of 32.

        Returns:
            (batch, image tokens, 64) float32.
        """
        time_embedding = self.t_embedder(sinusoids)
        x = self.pad_rows(self.all_x_embedder["2-1"](hidden_states), pad, self.x_pad_token)
        cos, sin = self.tables(x, cos, sin)
        image_cos, image_sin = self.leading(x, cos, sin)
        for block in self.noise_refiner:
            x = block(x, image_cos, image_sin, time_embedding)
        x = self.join(x, caption)
        for block in self.layers:
            x = block(x, cos, sin, time_embedding)
        out: Tensor = self.all_final_layer["2-1"](x, time_embedding, pad)
        return out


class CaptionEmbedding(nn.Sequential):
    """Text-encoder rows to caption tokens."""

    def __init__(self, config: Config) -> None:
        width = config.cap_feat_dim
        super().__init__(nn.RMSNorm(width, eps=config.norm_eps), nn.Linear(width, config.dim))

    def forward(self, prompt_embeds: Tensor) -> Tensor:
        """(1, caption tokens, cap_feat_dim) float32 -> (1, caption tokens, dim)."""
        return super().forward(prompt_embeds.to(weight_dtype(self)))


class ZImageConditioner(nn.Module):
    """Once per prompt: the caption embedder and the context refiner, which do not depend on time."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.cap_pad_token = nn.Parameter(torch.empty(1, config.dim))
        self.cap_embedder = CaptionEmbedding(config)
        self.context_refiner = nn.ModuleList(ZImageContextBlock(config) for _ in range(config.n_refiner_layers))
        self.pad_rows, self.tables, self.border = PadRows(), Tables(), Border()

    def forward(self, prompt_embeds: Tensor, cos: Tensor, sin: Tensor, pad: Tensor) -> Tensor:
        """One prompt.

        Args:
            prompt_embeds: (1, caption tokens, cap_feat_dim) float32, padded to a multiple of 32 tokens.
            cos: (caption tokens, head_dim / 2) float32.
            sin: as ``cos``.
            pad: (caption tokens,) bool, True at the padding.

        Returns:
            (1, caption tokens, dim) float32.
        """
        x = self.pad_rows(self.cap_embedder(prompt_embeds), pad, self.cap_pad_token)
        cos, sin = self.tables(x, cos, sin)
        for block in self.context_refiner:
            x = block(x, cos, sin)
        out: Tensor = self.border(x)
        return out


def parts(config: Mapping[str, Any]) -> dict[str, Part]:
    """The components that the transformer becomes where it draws from text alone.

    Raises:
        CheckpointError: the config is of no network that zimgkit implements, or of one that takes pictures.
    """
    found = read_config(config)
    if found.siglip_feat_dim is not None:
        raise CheckpointError(f"{FILE} has siglip_feat_dim = {found.siglip_feat_dim}; zimgkit supports None only")
    return plain_parts(found)


def plain_parts(found: Config) -> dict[str, Part]:
    """The components of any transformer but those for pictures."""
    dim, half = found.dim, found.dim // found.n_heads // 2
    float32 = torch.float32
    conditioner = Part(
        "transformer",
        lambda: ZImageConditioner(found),
        inputs=(
            Input("prompt_embeds", float32, (1, "caption_tokens", found.cap_feat_dim)),
            Input("cos", float32, ("caption_tokens", half)),
            Input("sin", float32, ("caption_tokens", half)),
            Input("pad", torch.bool, ("caption_tokens",)),
        ),
        outputs=("caption",),
        sizes=({"caption_tokens": 96}, {"caption_tokens": 160}),
    )
    denoiser = Part(
        "transformer",
        lambda: ZImageDenoiser(found),
        inputs=(
            Input("hidden_states", float32, ("batch", "image_tokens", 4 * found.in_channels)),
            Input("sinusoids", float32, (1, 256)),
            Input("caption", float32, (1, "caption_tokens", dim)),
            Input("cos", float32, ("all_tokens", half)),
            Input("sin", float32, ("all_tokens", half)),
            Input("pad", torch.bool, ("image_tokens",)),
        ),
        outputs=("velocity",),
        sizes=(
            {"batch": 2, "image_tokens": 96, "caption_tokens": 64, "all_tokens": 160},
            {"batch": 3, "image_tokens": 160, "caption_tokens": 128, "all_tokens": 288},
        ),
        cut=Cut(
            "layers",
            ("all_final_layer.2-1",),
            {
                "layers": ("x",),
                "t_embedder": ("time_embedding", "clean_embedding"),
                "tables": ("wide_cos", "wide_sin"),
            },
        ),
    )
    return {"conditioner": conditioner, "denoiser": denoiser}


def checkpoint_shapes(config: Mapping[str, Any]) -> Shapes:
    """The tensors of a whole transformer, by their names in a checkpoint, and their shapes, but those for pictures."""
    return stored_shapes(plain_parts(read_config(config)))
