"""Qwen2.5-VL's vision tower, which reads one picture for the text encoder.

Source: ``Qwen2_5_VisionTransformerPretrainedModel`` of transformers 5. Most blocks attend within windows of a picture,
some to all of it. Patches come in the order of windows, so that one picture's are rows of a matrix with no gaps; what
patches a window has, their positions and the order of the result are the host's.

A network's ``forward`` only calls its children; each kind of child is traced once, see ``zimgkit.export.graphs.trace``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx import ops

from zimgkit.engines.decoding import Small, Width, decoded
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.layers import attention, split_heads
from zimgkit.export.networks.parts import Input, Part

FILE = "text_encoder/config.json"


class Config(msgspec.Struct, frozen=True):
    """What of ``vision_config`` in ``text_encoder/config.json`` makes the network; the defaults are transformers'."""

    hidden_size: Width
    depth: Small = 32
    intermediate_size: Width = 3420
    num_heads: Small = 16
    out_hidden_size: Width = 3584
    in_channels: Small = 3
    patch_size: Small = 14
    temporal_patch_size: Small = 2
    spatial_merge_size: Small = 2
    window_size: Width = 112
    fullatt_block_indexes: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = (7, 15, 23, 31)
    hidden_act: Literal["silu"] = "silu"

    @property
    def patch_values(self) -> int:
        """Numbers in a patch: channels, frames, rows, columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged(self) -> int:
        """Patches that become one row for the text encoder."""
        return self.spatial_merge_size**2

    @property
    def window_patches(self) -> int:
        """The most patches in a window."""
        return self.merged * (self.window_size // self.spatial_merge_size // self.patch_size) ** 2


class _Whole(msgspec.Struct, frozen=True):
    vision_config: Config | None = None


def read_config(config: Mapping[str, Any]) -> Config:
    """Read the vision tower's part of ``text_encoder/config.json``.

    Raises:
        CheckpointError: there is none, or it is of no network that is implemented here.
    """
    found = decoded(config, _Whole, FILE, CheckpointError).vision_config
    if found is None:
        raise CheckpointError(
            f"{FILE} has no vision_config", "a picture is read by a vision tower; name a checkpoint with one"
        )
    if found.hidden_size % (2 * found.num_heads):
        raise CheckpointError(f"{FILE}: vision_config has hidden_size and num_heads that make no even heads")
    if not found.window_patches:
        raise CheckpointError(f"{FILE}: vision_config has a window_size below one merged patch")
    return found


class PatchEmbedding(nn.Module):
    """Patches to tokens: a convolution whose steps are as wide as its kernel, and so a linear of all of a patch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        kernel = config.temporal_patch_size, config.patch_size, config.patch_size
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(patches, values) float32 -> (patches, dim)."""
        weight = self.proj.weight.flatten(1)
        return F.linear(pixel_values.to(weight.dtype), weight)


class WindowMask(nn.Module):
    """Which slots of its window each slot sees, widened once for all blocks."""

    def forward(self, window_mask: Tensor) -> Tensor:
        """(windows, slots) bool -> (windows, 1, slots, slots) bool."""
        slots = window_mask.shape[1]
        return window_mask[:, None, None].expand(-1, 1, slots, -1)


class VisionAttention(nn.Module):
    """Self-attention of all patches, or of those of each window."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *windows: Tensor) -> Tensor:
        """(patches, dim), tables (patches, head_dim / 2), windows as in :class:`VisionBlock` -> (patches, dim)."""
        query, key, value = self.qkv(x).unsqueeze(0).chunk(3, dim=-1)
        query, key = (self._rotate(rows, cos, sin) for rows in (query, key))
        if not windows:
            return self.proj(attention(*map(self._heads, (query, key, value))).squeeze(0))
        index, places, mask = windows
        # The rows of each window's slots.
        query, key, value = (self._heads(F.embedding(index, rows.squeeze(0))) for rows in (query, key, value))
        out = attention(query, key, value, mask).flatten(0, 1)
        return self.proj(F.embedding(places, out))

    def _rotate(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn pairs, of a head's first and second half, in float32."""
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
        return ops.rotary_embedding(rows.float(), cos, sin, num_heads=self.heads).to(rows.dtype)

    def _heads(self, rows: Tensor) -> Tensor:
        return split_heads(rows, rows.shape[-1] // self.heads).transpose(1, 2)


class VisionMLP(nn.Module):
    """A gated MLP with biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.down_proj = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class VisionBlock(nn.Module):
    """One block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.attn = VisionAttention(dim, config.num_heads)
        self.mlp = VisionMLP(dim, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *windows: Tensor) -> Tensor:
        """One block.

        Args:
            x: (patches, dim).
            cos: (patches, head_dim / 2) float32.
            sin: as ``cos``.
            windows: none where all patches see each other; else ``window_index`` and ``patch_places`` of the network,
                and a mask (windows, 1, slots, slots).

        Returns:
            (patches, dim).
        """
        x = x + self.attn(self.norm1(x), cos, sin, *windows)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Each few patches that follow each other to one row for the text encoder."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.width = config.merged * config.hidden_size
        self.ln_q = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(patches, dim) -> (patches / 4, out_hidden_size) float32."""
        out: Tensor = self.mlp(self.ln_q(x).reshape(-1, self.width))
        return out.float()


class Visual(nn.Module):
    """What the checkpoint has under this name."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)


class VisionTower(nn.Module):
    """The patches of one picture to rows for the text encoder."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.full = config.fullatt_block_indexes
        self.visual = Visual(config)
        self.window_mask = WindowMask()

    def forward(
        self,
        pixel_values: Tensor,
        cos: Tensor,
        sin: Tensor,
        window_index: Tensor,
        window_mask: Tensor,
        patch_places: Tensor,
    ) -> Tensor:
        """One picture. Its patches stand window by window, in a window by merged rows, of each its four patches.

        Args:
            pixel_values: (patches, 1176) float32, normalized pixels: channels, frames, rows, columns.
            cos: (patches, head_dim / 2) float32, of rows, then of columns.
            sin: as ``cos``.
            window_index: (windows, slots) int64, the patch in each slot; any patch where a slot is free.
            window_mask: (windows, slots) bool, whether a slot is taken.
            patch_places: (patches,) int64, in which slot each patch is, counted through all windows.

        Returns:
            (patches / 4, out_hidden_size) float32, in the order of windows.
        """
        visual = self.visual
        x = visual.patch_embed(pixel_values)
        windows = window_index, patch_places, self.window_mask(window_mask)
        for index, block in enumerate(visual.blocks):
            x = block(x, cos, sin) if index in self.full else block(x, cos, sin, *windows)
        out: Tensor = visual.merger(x)
        return out


def parts(config: Mapping[str, Any]) -> dict[str, Part]:
    """The component that the vision tower becomes; of the checkpoint's text encoder.

    Raises:
        CheckpointError: the config is of no network that zimgkit implements.
    """
    found = read_config(config)
    half, slots = found.hidden_size // found.num_heads // 2, found.window_patches
    part = Part(
        "text_encoder",
        lambda: VisionTower(found),
        inputs=(
            Input("pixel_values", torch.float32, ("patches", found.patch_values)),
            Input("cos", torch.float32, ("patches", half)),
            Input("sin", torch.float32, ("patches", half)),
            Input("window_index", torch.int64, ("windows", slots)),
            Input("window_mask", torch.bool, ("windows", slots)),
            Input("patch_places", torch.int64, ("patches",)),
        ),
        outputs=("picture_embeds",),
        sizes=(
            {"patches": 25 * found.merged, "picture_tokens": 25, "windows": 9},
            {"patches": 42 * found.merged, "picture_tokens": 42, "windows": 11},
        ),
    )
    return {"vision_encoder": part}
