"""The Z-Image transformer where it takes pictures: their clean latents, and what SigLIP2 makes of them.

Source: the "omni" mode of ``ZImageTransformer2DModel`` of diffusers 0.42. Clean tokens are modulated as at time 1. Its
order of tokens is the caption, pictures, SigLIP2's; here the target comes first, then other pictures, the caption and
SigLIP2's: positions are in the tables, so attention does not see the order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.layers import Border, Tables
from zimgkit.export.networks.parts import Input, Part
from zimgkit.export.networks.z_image import (
    FILE,
    CaptionEmbedding,
    Config,
    PadRows,
    ZImageBlock,
    ZImageContextBlock,
    ZImageDenoiser,
    plain_parts,
    read_config,
)


class OmniBlock(ZImageBlock):
    """A block that modulates clean tokens by a time of their own."""

    def forward(  # type: ignore[override]
        self, x: Tensor, cos: Tensor, sin: Tensor, time_embedding: Tensor, clean_embedding: Tensor, is_clean: Tensor
    ) -> Tensor:
        """As the base class, with the embedding of time 1, (1, width), and bool (tokens, 1)."""
        of_time, of_clean = self._modulation(time_embedding), self._modulation(clean_embedding)
        chosen = [torch.where(is_clean, b, a) for a, b in zip(of_time, of_clean, strict=True)]
        return self._modulated(x, cos, sin, chosen)


class LeadingRows(nn.Module):
    """The leading rows of a column, as many as ``x`` has tokens."""

    def forward(self, x: Tensor, column: Tensor) -> Tensor:
        """(batch, tokens, dim), (all tokens, 1) -> (tokens, 1)."""
        return column.index_select(0, torch.arange(x.shape[1], device=x.device))


class Column(nn.Module):
    """A mask of tokens, turned for all blocks."""

    def forward(self, mask: Tensor) -> Tensor:
        """(tokens,) -> (tokens, 1)."""
        return mask[:, None]


class OmniDenoiser(ZImageDenoiser):
    """Every step, beside pictures."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.noise_refiner = nn.ModuleList(OmniBlock(config) for _ in range(config.n_refiner_layers))
        self.layers = nn.ModuleList(OmniBlock(config) for _ in range(config.n_layers))
        self.column, self.leading_rows = Column(), LeadingRows()

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        condition: Tensor,
        sinusoids: Tensor,
        clean_sinusoids: Tensor,
        caption: Tensor,
        picture: Tensor,
        cos: Tensor,
        sin: Tensor,
        pad: Tensor,
        condition_pad: Tensor,
        is_clean: Tensor,
    ) -> Tensor:
        """One forward. Each piece fills up a multiple of 32 tokens.

        Args:
            hidden_states: (batch, image tokens, 64) float32.
            condition: (1, condition tokens, 64) float32, the patches of the other pictures' latents.
            sinusoids: (1, 256) float32, of the time 1 - sigma.
            clean_sinusoids: (1, 256) float32, of the time 1.
            caption: (1, caption tokens, dim) float32 from the conditioner, all its pieces.
            picture: (1, picture tokens, dim) float32 from the picture conditioner.
            cos: (image + condition + caption + picture tokens, head_dim / 2) float32.
            sin: as ``cos``.
            pad: (image tokens,) bool, True where a token only fills up.
            condition_pad: (condition tokens,) bool, likewise.
            is_clean: (all tokens,) bool, True where a token belongs to a picture that is given.

        Returns:
            (batch, image tokens, 64) float32.
        """
        embedder = self.all_x_embedder["2-1"]
        times = self.t_embedder(sinusoids), self.t_embedder(clean_sinusoids)
        target = self.pad_rows(embedder(hidden_states), pad, self.x_pad_token)
        x = self.join(target, self.pad_rows(embedder(condition), condition_pad, self.x_pad_token))
        cos, sin = self.tables(x, cos, sin)
        is_clean = self.column(is_clean)
        image_cos, image_sin = self.leading(x, cos, sin)
        image_is_clean = self.leading_rows(x, is_clean)
        for block in self.noise_refiner:
            x = block(x, image_cos, image_sin, *times, image_is_clean)
        x = self.join(self.join(x, caption), picture)
        for block in self.layers:
            x = block(x, cos, sin, *times, is_clean)
        out: Tensor = self.all_final_layer["2-1"](x, times[0], pad)
        return out


class PictureConditioner(nn.Module):
    """Once per picture: the embedder of SigLIP2's rows and their refiner."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.siglip_pad_token = nn.Parameter(torch.empty(1, config.dim))
        self.siglip_embedder = CaptionEmbedding(msgspec.structs.replace(config, cap_feat_dim=config.siglip_feat_dim))
        self.siglip_refiner = nn.ModuleList(ZImageContextBlock(config) for _ in range(config.n_refiner_layers))
        self.pad_rows, self.tables, self.border = PadRows(), Tables(), Border()

    def forward(self, picture_embeds: Tensor, cos: Tensor, sin: Tensor, pad: Tensor) -> Tensor:
        """All pictures of a prompt.

        Args:
            picture_embeds: (1, picture tokens, siglip_feat_dim) float32, each one padded to a multiple of 32 tokens.
            cos: (picture tokens, head_dim / 2) float32.
            sin: as ``cos``.
            pad: (picture tokens,) bool, True at the padding.

        Returns:
            (1, picture tokens, dim) float32.
        """
        x = self.pad_rows(self.siglip_embedder(picture_embeds), pad, self.siglip_pad_token)
        cos, sin = self.tables(x, cos, sin)
        for block in self.siglip_refiner:
            x = block(x, cos, sin)
        out: Tensor = self.border(x)
        return out


def edit_parts(config: Mapping[str, Any]) -> dict[str, Part]:
    """The components that the transformer becomes: the denoiser's variant ``conditions``, and a picture conditioner.

    Raises:
        CheckpointError: the config is of no network that zimgkit implements, or of one that takes no pictures.
    """
    found = read_config(config)
    if found.siglip_feat_dim is None:
        raise CheckpointError(f"{FILE} has no siglip_feat_dim: it takes no pictures", "name a checkpoint that does")
    float32, dim, half = torch.float32, found.dim, found.dim // found.n_heads // 2
    whole = plain_parts(found)
    denoiser = whole["denoiser"]
    hidden_states, sinusoids, caption, cos, sin, pad = denoiser.inputs
    first, second = denoiser.sizes
    variant = replace(
        denoiser,
        network=lambda: OmniDenoiser(found),
        inputs=(
            hidden_states,
            Input("condition", float32, (1, "condition_tokens", 4 * found.in_channels)),
            sinusoids,
            replace(sinusoids, name="clean_sinusoids"),
            caption,
            Input("picture", float32, (1, "picture_tokens", dim)),
            cos,
            sin,
            pad,
            Input("condition_pad", torch.bool, ("condition_tokens",)),
            Input("is_clean", torch.bool, ("all_tokens",)),
        ),
        sizes=(
            {**first, "condition_tokens": 128, "picture_tokens": 192, "all_tokens": 480},
            {**second, "condition_tokens": 224, "picture_tokens": 256, "all_tokens": 768},
        ),
    )
    picture_conditioner = Part(
        "transformer",
        lambda: PictureConditioner(found),
        inputs=(
            Input("picture_embeds", float32, (1, "picture_tokens", found.siglip_feat_dim)),
            Input("cos", float32, ("picture_tokens", half)),
            Input("sin", float32, ("picture_tokens", half)),
            Input("pad", torch.bool, ("picture_tokens",)),
        ),
        outputs=("picture",),
        sizes=({"picture_tokens": 96}, {"picture_tokens": 160}),
    )
    return {
        "conditioner": whole["conditioner"],
        "picture_conditioner": picture_conditioner,
        "denoiser": replace(denoiser, variants={"conditions": variant}),
    }
