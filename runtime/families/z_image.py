"""Z-Image on the host side. Source: ``ZImagePipeline`` and ``ZImageTransformer2DModel`` of diffusers 0.42."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import MANIFEST, TextConfig
from zimgkit.engines.decoding import Count, Even, Number, Positive, Small, Width, decoded
from zimgkit.engines.errors import CheckpointError, UsageError
from zimgkit.runtime.diffusion.guidance import norm_capped_guidance
from zimgkit.runtime.diffusion.latents import TokenLayout, denormalize, pack, unpack
from zimgkit.runtime.diffusion.positions import Tables, axis_tables, grid
from zimgkit.runtime.diffusion.schedule import NUM_TRAIN_TIMESTEPS, Sigmas, linspace_float32, timesteps
from zimgkit.runtime.diffusion.time_embedding import frequencies, sinusoids
from zimgkit.runtime.families.base import Array, Config, Family, Feeds, Progress, StepInputs
from zimgkit.runtime.pictures.tiles import Tiling

if TYPE_CHECKING:
    from zimgkit.engines.bundle import Bundle

LAYOUT: TokenLayout = "ph pw c"
MULTIPLE = 32
"""Captions and images fill up to a multiple of this many tokens."""


class Transformer(msgspec.Struct, frozen=True):
    """What the host side reads of ``transformer/config.json``."""

    in_channels: Small
    axes_dims: tuple[Even, Even, Even]
    axes_lens: tuple[Count, Count, Count]
    rope_theta: Positive
    t_scale: Number
    dim: Width = 1


class Vae(msgspec.Struct, frozen=True):
    """What the host side reads of ``vae/config.json``, beside the normalization; the default is diffusers'."""

    block_out_channels: Annotated[tuple[Width, ...], msgspec.Meta(min_length=2)] = (64, 64)


class ZImage(Family):
    """Latents are (batch, channels, height / 8, width / 8); image and caption each fill up to 32 tokens."""

    NAME = "z-image"
    TEXT = TextConfig(
        prefix="<|im_start|>user\n",
        suffix="<|im_end|>\n<|im_start|>assistant\n",
        drop=0,
        max_tokens=1024,
        max_sequence_length=512,
    )
    MAX_SIDE = 8192
    USES_CHAT_TEMPLATE = True
    NEGATIVE_PROMPT = ""
    STRENGTHS: ClassVar[Mapping[str, float]] = {"image-to-image": 0.6, "inpaint": 1.0}
    TILING = Tiling(1024, 256, is_close=False)  # Group norms see a tile's own pixels only.

    def __init__(self, config: Config, where: str = MANIFEST) -> None:
        super().__init__(config, where)
        transformer, vae = config.get("transformer", {}), config.get("vae", {})
        self.transformer = decoded(transformer, Transformer, f"{where}: config.transformer", CheckpointError)
        self.vae = decoded(vae, Vae, f"{where}: config.vae", CheckpointError)

    @staticmethod
    def dynamic_dimensions(
        height: int, width: int, tokens: int, conditions: int = 0, frames: int = 1
    ) -> dict[str, int]:
        """Image and caption each fill up to a multiple of 32 tokens."""
        image, caption = (padded_length(count) for count in ((height // 16) * (width // 16), tokens))
        return {
            "tokens": tokens,
            "caption_tokens": caption,
            "image_tokens": image,
            "all_tokens": image + caption,
            "height": height // 8,
            "width": width // 8,
            "image_height": height,
            "image_width": width,
        }

    def base_sigmas(self, num_inference_steps: int) -> list[float] | None:
        """Equal steps, rounded as torch's linspace does."""
        return linspace_float32(num_inference_steps)

    def noise_dtype(self, precision: str) -> str:
        """Noise is drawn in float32, whatever the weights are in."""
        return "float32"

    def noise_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """(channels, height / 8, width / 8)."""
        return (self.transformer.in_channels, height // 8, width // 8)

    def from_noise(self, noise: Array) -> Array:
        """Latents are kept as (batch, channels, height / 8, width / 8)."""
        return noise

    def latents_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """(channels, height / 8, width / 8)."""
        return self.noise_shape(height, width)

    def to_vae(self, latents: Array, height: int, width: int) -> Array:
        """Undo the VAE's scaling."""
        return denormalize(latents, self.normalization)

    def denoiser_widths(self) -> tuple[int, int]:
        """A feed-forward is 8/3 as wide."""
        return self.transformer.dim, int(self.transformer.dim / 3 * 8)

    def vae_channels(self) -> int:
        """The last upsampler keeps the channels of its level."""
        return self.vae.block_out_channels[1]

    def conditioner_inputs(self, prompt_embeds: Array) -> Feeds:
        """Pad the caption to a multiple of 32 tokens; the pads' rows are replaced by a learned token in the network."""
        tokens = len(prompt_embeds)
        pad = pad_mask(tokens)
        padded = np.zeros((1, len(pad), prompt_embeds.shape[1]), np.float32)
        padded[0, :tokens] = prompt_embeds
        cos, sin = tables(caption_positions(tokens), self.transformer)
        return {"prompt_embeds": padded, "cos": cos, "sin": sin, "pad": pad}

    def denoiser_constants(self, conditioning: Array, tokens: int, height: int, width: int) -> Feeds:
        """The refined caption, and tables for image tokens followed by caption tokens."""
        rows, columns = height // 16, width // 16
        positions = np.concatenate([image_positions(rows, columns, tokens), caption_positions(tokens)])
        cos, sin = tables(positions, self.transformer)
        return {"caption": conditioning, "cos": cos, "sin": sin, "pad": pad_mask(rows * columns)}

    def schedule_inputs(self, bundle: Bundle, sigmas: Array, progress: Progress | None = None) -> StepInputs:
        """Sinusoids of each step's time, which runs from 0 (noise) to 1."""
        scale = self.transformer.t_scale
        return lambda step: {"sinusoids": time_embedding(network_time(sigmas[step : step + 1]), scale)}

    def denoiser_inputs(self, latents: Array) -> Feeds:
        """Patches, padded to a multiple of 32 tokens."""
        patches = pack(latents, LAYOUT)
        batch, tokens, features = patches.shape
        padded = np.zeros((batch, padded_length(tokens), features), np.float32)
        padded[:, :tokens] = patches
        return {"hidden_states": padded}

    def velocity(self, output: Array, latents: Array) -> Array:
        """The network predicts the negated velocity, patch by patch; pads are dropped."""
        _, _, height, width = latents.shape
        return -unpack(output[:, : height * width // 4], LAYOUT, height, width)

    @staticmethod
    def guidance_scale(cfg_scale: float) -> float:
        """One less: DiffSynth's 1, guidance off, is 0 here."""
        return cfg_scale - 1

    @staticmethod
    def cfg_scale(guidance_scale: float) -> float:
        """One more."""
        return guidance_scale + 1

    @staticmethod
    def is_guided(guidance_scale: float, sigma: float = 1.0, cfg_truncation: float | None = 1.0) -> bool:
        """Whether ``ZImagePipeline`` runs the negative prompt at this noise level.

        Args:
            guidance_scale: on above 0.
            sigma: the noise level of the step.
            cfg_truncation: t <= 1 switches guidance off where 1 - sigma > t. None, or above 1, never does.
        """
        if guidance_scale <= 0:
            return False
        if cfg_truncation is None or cfg_truncation > 1:
            return True
        return not float(network_time(np.float32(sigma))) > cfg_truncation

    def guide(self, positive: Array, negative: Array, guidance_scale: float, cfg_normalization: float = 0.0) -> Array:
        """``pos + g (pos - neg)``, optionally with a cap on its norm, as ``ZImagePipeline``."""
        return norm_capped_guidance(positive, negative, guidance_scale, cfg_normalization)


def network_time(sigmas: Sigmas) -> Sigmas:
    """The time that the network takes in, 0 at the start and 1 at the end (1 - sigma); one or an array."""
    return (np.float32(NUM_TRAIN_TIMESTEPS) - timesteps(sigmas)) / np.float32(NUM_TRAIN_TIMESTEPS)


def time_embedding(times: Array, scale: float) -> Array:
    """As ``TimestepEmbedder`` of diffusers makes it: (scale x time) x frequency; (N,) -> float32 (N, 256).

    Args:
        times: float32 (N,), in 0 ... 1.
        scale: ``t_scale`` of the transformer's config.
    """
    return sinusoids((np.float32(scale) * times)[:, None] * frequencies())


def padded_length(length: int) -> int:
    """How many tokens a caption or an image of ``length`` tokens takes up: the next multiple of 32."""
    return -(-length // MULTIPLE) * MULTIPLE


def pad_mask(length: int) -> NDArray[np.bool_]:
    """Which tokens of the padded sequence are pads: bool (padded length,), False for the first ``length``."""
    return np.arange(padded_length(length)) >= length


def caption_positions(length: int) -> NDArray[np.int64]:
    """Positions of a caption's tokens: 1, 2, ... on the first axis, running on through the pads.

    As ``ZImageTransformer2DModel.patchify_and_embed`` of diffusers.

    Returns:
        int64 (padded length, 3).
    """
    return grid(np.arange(1, padded_length(length) + 1), 0, 0)


def image_positions(height: int, width: int, caption_length: int) -> NDArray[np.int64]:
    """Positions of an image's tokens, row by row: one step past the padded caption, row, column; pads at the origin.

    Args:
        height: rows of the token grid (a sixteenth of the picture's).
        width: columns of the token grid.
        caption_length: tokens of the caption without its pads.

    Returns:
        int64 (padded height * width, 3).
    """
    positions = np.zeros((padded_length(height * width), 3), np.int64)
    positions[: height * width] = grid(padded_length(caption_length) + 1, np.arange(height), np.arange(width))
    return positions


def tables(positions: NDArray[np.int64], transformer: Transformer) -> Tables:
    """Tables of positions (tokens, 3) for the transformer.

    Raises:
        UsageError: a position past the model's ``axes_lens``: the caption or the picture is too large.
    """
    captions, rows, columns = transformer.axes_lens
    # The image's own position comes after the caption's, and a caption is a multiple of 32 long.
    longest = (captions - 2) // MULTIPLE * MULTIPLE
    most = (f"{longest} prompt tokens", f"{16 * rows} pixels of height", f"{16 * columns} pixels of width")
    for highest, length, limit in zip(positions.max(axis=0), (captions, rows, columns), most, strict=True):
        if highest >= length:
            raise UsageError(f"too large for this model, which takes {limit} at most", "ask for less")
    return axis_tables(positions, transformer.axes_dims, transformer.rope_theta, precision=np.float64)
