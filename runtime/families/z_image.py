"""Z-Image on the host side. Source: ``ZImagePipeline`` and ``ZImageTransformer2DModel`` of diffusers 0.42."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from zimgkit.runtime.families.base import (
    Array,
    Beside,
    Config,
    ControlPictures,
    Encode,
    Encoded,
    Feeds,
    Progress,
    SegmentedFamily,
    StepInputs,
)
from zimgkit.runtime.families.z_image_control import condition
from zimgkit.runtime.pictures.patches import MostPatches, PatchPreprocessor, padded_patches, patched_size
from zimgkit.runtime.pictures.resampling import mixing
from zimgkit.runtime.pictures.tiles import Tiling
from zimgkit.runtime.text.qwen_vision import TowerInputs

if TYPE_CHECKING:
    from PIL.Image import Image

    from zimgkit.engines.bundle import Bundle, Control

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
    n_heads: Small = 1
    siglip_feat_dim: Width | None = None
    """How wide the rows of pictures are, where it takes some."""


class Siglip(msgspec.Struct, frozen=True):
    """What the host side reads of ``siglip/config.json``; the defaults are transformers'."""

    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_patches: MostPatches = 256
    patch_size: Small = 16

    @property
    def side(self) -> int:
        """Of the square of positions that it was trained with."""
        return math.isqrt(self.num_patches)


class Vae(msgspec.Struct, frozen=True):
    """What the host side reads of ``vae/config.json``, beside the normalization; the default is diffusers'."""

    block_out_channels: Annotated[tuple[Width, ...], msgspec.Meta(min_length=2)] = (64, 64)


class ZImage(SegmentedFamily):
    """Latents are (batch, channels, height / 8, width / 8); image and caption each fill up to 32 tokens.

    Source of what it does beside pictures: ``ZImageOmniPipeline``, and ``patchify_and_embed_omni`` of the transformer.
    """

    NAME = "z-image"
    TEXT = TextConfig(
        prefix="<|im_start|>user\n",
        suffix="<|im_end|>\n<|im_start|>assistant\n",
        drop=0,
        max_tokens=1024,
        max_sequence_length=512,
    )
    EDIT_TEXT = TEXT
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
        self.vision = decoded(config.get("siglip", {}), Siglip, f"{where}: config.siglip", CheckpointError)
        processor = config.get("siglip_processor", {})
        self.preprocessor = decoded(processor, PatchPreprocessor, f"{where}: config.siglip_processor", CheckpointError)
        self.merge = 1
        width = self.transformer.siglip_feat_dim
        if width is not None and (found := self.vision.hidden_size) != width:
            raise CheckpointError(f"{where}: siglip_feat_dim is {width}, and hidden_size of siglip {found}")
        if width is not None and (side := self.preprocessor.patch_size) != self.vision.patch_size:
            message = f"{where}: patch_size of siglip is {self.vision.patch_size}, and of siglip_processor {side}"
            raise CheckpointError(message)

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
            "all_tokens": image + caption + conditions,
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

    def denoiser_heads(self) -> int:
        """As its config has them."""
        return self.transformer.n_heads

    def vae_channels(self) -> int:
        """The last upsampler keeps the channels of its level."""
        return self.vae.block_out_channels[1]

    def vision_widths(self) -> tuple[int, int]:
        """As its config has them."""
        return self.vision.hidden_size, self.vision.intermediate_size

    def conditioner_inputs(self, prompt_embeds: Array) -> Feeds:
        """Pad the caption to a multiple of 32 tokens; the pads' rows are replaced by a learned token in the network."""
        return self.segments_inputs([prompt_embeds])

    def segments_tokens(self, lengths: Sequence[int]) -> int:
        """Each piece fills up to a multiple of 32 tokens."""
        return sum(map(padded_length, lengths))

    def segments_inputs(self, segments: Sequence[Array]) -> Feeds:
        """Likewise each piece of it."""
        lengths = [len(segment) for segment in segments]
        positions, _ = segments_positions(lengths)
        cos, sin = tables(positions, self.transformer)
        padded = np.concatenate([with_pads(segment) for segment in segments])[None]
        return {"prompt_embeds": padded, "cos": cos, "sin": sin, "pad": pad_masks(lengths)}

    def denoiser_constants(self, conditioning: Array, tokens: int, height: int, width: int) -> Feeds:
        """The refined caption, and tables for image tokens followed by caption tokens."""
        rows, columns = height // 16, width // 16
        image = image_positions(rows, columns, tokens)
        if self.transformer.siglip_feat_dim is not None:  # As if it stood behind pictures.
            image = placed(tokens + 1, np.arange(rows), np.arange(columns))
        cos, sin = tables(np.concatenate([image, caption_positions(tokens)]), self.transformer)
        return {"caption": conditioning, "cos": cos, "sin": sin, "pad": pad_mask(rows * columns)}

    def condition_tokens(self, grids: Sequence[tuple[int, int]], patches: Sequence[tuple[int, int]]) -> int:
        """Each picture's latents and rows fill up to a multiple of 32; the rows that the target lacks are pads."""
        pieces = [padded_length(rows * columns) for rows, columns in (*grids, *patches)]
        return sum(pieces) + (MULTIPLE if patches else 0)

    def reading_dimensions(
        self, grids: Sequence[tuple[int, int]], patches: Sequence[tuple[int, int]]
    ) -> dict[str, int]:
        """Tokens of latents and of rows, each filled up, and the pads for the rows that the target lacks."""
        of_latents, of_rows = (
            sum(padded_length(rows * columns) for rows, columns in all_) for all_ in (grids, patches)
        )
        return {"condition_tokens": of_latents, "picture_tokens": of_rows + MULTIPLE}

    def vision_dimensions(self, patches: tuple[int, int]) -> dict[str, int]:
        """Patches."""
        return {"patches": math.prod(patches)}

    def vision_grid(self, width: int, height: int) -> tuple[int, int]:
        """As ``Siglip2ImageProcessor`` resizes it."""
        own = self.preprocessor
        rows, columns = patched_size(height, width, own.patch_size, own.max_num_patches)
        return rows // own.patch_size, columns // own.patch_size

    def vision_inputs(self, picture: Image) -> TowerInputs:
        """The picture's own patches, without the pads of the reference; and how positions are stretched to these."""
        found = padded_patches(picture, self.preprocessor)
        rows, columns = found.spatial_shapes[0].tolist()
        weights = np.kron(mixing(self.vision.side, rows), mixing(self.vision.side, columns))
        feeds = {"pixel_values": found.pixel_values[0, : rows * columns], "interpolation": weights}
        return TowerInputs(feeds, np.arange(rows * columns))

    def picture_conditioner_inputs(self, lengths: Sequence[int], beside: Beside) -> Feeds:
        """All pictures' rows, and 32 pads for those that the target lacks.

        The reference lays rows of all channels out as if channels came last, as it was trained.
        """
        rows = [with_pads(own.T.reshape(own.shape)) for own in beside.rows]
        rows.append(np.zeros((MULTIPLE, rows[0].shape[1]), np.float32))
        pads = [pad_masks([len(own) for own in beside.rows]), np.ones(MULTIPLE, np.bool_)]
        cos, sin = tables(pictures_positions(lengths, beside), self.transformer)
        return {"picture_embeds": np.concatenate(rows)[None], "cos": cos, "sin": sin, "pad": np.concatenate(pads)}

    def conditioned_constants(self, bundle: Bundle, text: Encoded, height: int, width: int, beside: Beside) -> Feeds:
        """Pictures' patches and the refined caption and rows; of all tokens their tables, and which are clean.

        The target's tokens come first, then those of the pictures, the caption and the rows. What stands before the
        end of the last picture is clean, as the pictures are: modulated as at time 1.
        """
        own, count = (height // 16, width // 16), len(beside.grids)
        caption, ends = segments_positions(text.lengths)
        grids = [own, *beside.grids]
        images = [placed(end, *map(np.arange, sides)) for end, sides in zip((ends[count], *ends), grids, strict=False)]
        positions = np.concatenate([*images, caption, pictures_positions(text.lengths, beside)])
        cos, sin = tables(positions, self.transformer)
        sizes = [rows * columns for rows, columns in grids]
        seen = [*(padded_length(len(rows)) for rows in beside.rows), MULTIPLE]
        of_captions = [padded_length(length) for length in text.lengths]
        lengths = [*map(padded_length, sizes), *of_captions, *seen]
        clean = [False] + [True] * count
        clean += [index < count for index in (*range(len(of_captions)), *range(len(seen)))]
        return {
            "condition": np.concatenate([with_pads(pack(latents, LAYOUT)[0]) for latents in beside.latents])[None],
            "clean_sinusoids": time_embedding(np.ones(1, np.float32), self.transformer.t_scale),
            "caption": text.conditioning,
            "picture": text.pictures,
            "cos": cos,
            "sin": sin,
            "pad": pad_mask(sizes[0]),
            "condition_pad": pad_masks(sizes[1:]),
            "is_clean": np.repeat(clean, lengths),
        }

    def control_inputs(
        self, net: Control, given: ControlPictures, encode: Encode, text: Encoded, height: int, width: int
    ) -> Feeds:
        """Patches of what the net sees, padded to a multiple of 32 tokens."""
        if net.kind != "fun":
            return super().control_inputs(net, given, encode, text, height, width)
        inpaints = "inpaint_image" in net.takes
        channels = condition(given, encode, self.latents_shape(height, width), inpaints=inpaints)
        return {"condition": with_pads(pack(channels, LAYOUT)[0])[None]}

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
    def is_guided(guidance_scale: float) -> bool:
        """Guidance is on above 0."""
        return guidance_scale > 0

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


def pad_masks(lengths: Sequence[int]) -> NDArray[np.bool_]:
    """Likewise of several sequences, one after the other."""
    return np.concatenate([pad_mask(length) for length in lengths])


def with_pads(rows: Array) -> Array:
    """(length, width) -> float32 (padded length, width), zeros at the pads."""
    padded = np.zeros((padded_length(len(rows)), rows.shape[1]), np.float32)
    padded[: len(rows)] = rows
    return padded


def caption_positions(length: int) -> NDArray[np.int64]:
    """Positions of a caption's tokens: 1, 2, ... on the first axis, running on through the pads.

    As ``ZImageTransformer2DModel.patchify_and_embed`` of diffusers.

    Returns:
        int64 (padded length, 3).
    """
    positions, _ = segments_positions([length])
    return positions


def segments_positions(lengths: Sequence[int]) -> tuple[NDArray[np.int64], list[int]]:
    """Positions of a caption's tokens where it is in pieces: each leaves two free behind its own, for a picture.

    Where a piece has pads, the reference has positions of these twice, running on and at the origin, and cuts off
    what is too many of all: from the second piece on, tokens stand where others should.

    Args:
        lengths: tokens of each piece, without its pads.

    Returns:
        int64 (padded lengths, 3), and the position that follows each piece.
    """
    found, ends = [], []
    start = 1
    for length in lengths:
        padded = padded_length(length)
        found += [grid(np.arange(start, start + padded), 0, 0), np.zeros((padded - length, 3), np.int64)]
        ends.append(start + length)
        start = ends[-1] + 2
    return np.concatenate(found)[: sum(map(padded_length, lengths))], ends


def placed(first: int, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of a picture's tokens, row by row, all at one place of the first axis; pads at the origin.

    Args:
        first: that place.
        rows: the position of each row.
        columns: likewise.

    Returns:
        int64 (padded rows * columns, 3).
    """
    count = len(rows) * len(columns)
    positions = np.zeros((padded_length(count), 3), np.int64)
    positions[:count] = grid(first, rows, columns)
    return positions


def pictures_positions(lengths: Sequence[int], beside: Beside) -> NDArray[np.int64]:
    """Positions of the rows of pictures, stretched over their latents; and the origin for the target's pads.

    Args:
        lengths: tokens of the caption's pieces, without pads.
        beside: the pictures.

    Returns:
        int64 (padded tokens of all pictures + 32, 3).
    """
    _, ends = segments_positions(lengths)

    def stretched(count: int, tokens: int) -> NDArray[np.int64]:
        steps = np.arange(count, dtype=np.float32) / np.float32(max(count - 1, 1))
        return (steps * np.float32(2 * tokens - 1)).astype(np.int64)

    found = [
        placed(end + 1, *map(stretched, patches, tokens))
        for end, patches, tokens in zip(ends, beside.patches, beside.grids, strict=False)
    ]
    return np.concatenate([*found, np.zeros((MULTIPLE, 3), np.int64)])


def image_positions(height: int, width: int, caption_length: int) -> NDArray[np.int64]:
    """Positions of an image's tokens, row by row: one step past the padded caption, row, column; pads at the origin.

    Args:
        height: rows of the token grid (a sixteenth of the picture's).
        width: columns of the token grid.
        caption_length: tokens of the caption without its pads.

    Returns:
        int64 (padded height * width, 3).
    """
    return placed(padded_length(caption_length) + 1, np.arange(height), np.arange(width))


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
