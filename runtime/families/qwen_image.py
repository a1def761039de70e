"""Qwen-Image on the host side. Source: ``QwenImagePipeline`` and ``QwenImageTransformer2DModel`` of diffusers 0.42."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import MANIFEST, TextConfig
from zimgkit.engines.decoding import Even, Small, decoded
from zimgkit.engines.errors import CheckpointError
from zimgkit.runtime.diffusion.guidance import norm_preserving_guidance, plain_guidance
from zimgkit.runtime.diffusion.latents import TokenLayout, denormalize, pack, unpack
from zimgkit.runtime.diffusion.modulation import ModulationLayout, modulation_table
from zimgkit.runtime.diffusion.positions import Tables, axis_tables, grid
from zimgkit.runtime.diffusion.schedule import NUM_TRAIN_TIMESTEPS, Sigmas, linspace, timesteps
from zimgkit.runtime.diffusion.time_embedding import frequencies, sinusoids
from zimgkit.runtime.families.base import (
    Array,
    Beside,
    ConditionedFamily,
    Config,
    ControlPictures,
    Encode,
    Encoded,
    Feeds,
    Progress,
    StepInputs,
)
from zimgkit.runtime.pictures.patches import merged_patches, preprocessor, smart_resize
from zimgkit.runtime.pictures.resizing import resize, to_pixels
from zimgkit.runtime.pictures.tiles import Tiling
from zimgkit.runtime.text.edit_prompts import EDIT
from zimgkit.runtime.text.qwen_vision import (
    TowerInputs,
    VisionTower,
    token_positions,
    token_tables,
    tower_inputs,
    vision_tower,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from zimgkit.engines.bundle import Bundle, Control

LAYOUT: TokenLayout = "c ph pw"
RESIDUAL = "residual"
"""ControlNets with blocks of their own, which read the positive prompt in both branches of guidance."""
THETA = 10000.0
TOWER = VisionTower()
"""Of checkpoints that read no pictures."""
MODULATION = ModulationLayout(
    "time_text_embed.timestep_embedder",
    ("img_mod.1", "txt_mod.1"),
    "norm_out.linear",
    "time_text_embed.addition_t_embedding",
)


class Transformer(msgspec.Struct, frozen=True):
    """What the host side reads of ``transformer/config.json``."""

    in_channels: Annotated[int, msgspec.Meta(ge=4, le=4096, multiple_of=4)]
    axes_dims_rope: tuple[Even, Even, Even]
    num_attention_heads: Small = 1
    attention_head_dim: Small = 1
    zero_cond_t: bool = False
    """Whether pictures beside the drawn one are modulated as at time 0."""
    use_layer3d_rope: bool = False
    """Whether a picture is taken apart: it stands before the layers, not after what is drawn."""


class Vae(msgspec.Struct, frozen=True):
    """What the host side reads of ``vae/config.json``, beside the normalization; the defaults are diffusers'."""

    base_dim: Small = 96
    dim_mult: Annotated[tuple[Small, ...], msgspec.Meta(min_length=2)] = (1, 2, 4, 4)


class QwenImage(ConditionedFamily):
    """Latents are packed into tokens (batch, tokens, 4 * channels); the timestep acts through the modulation table."""

    NAME = "qwen-image"
    TEXT = TextConfig(
        prefix="<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
        "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
        suffix="<|im_end|>\n<|im_start|>assistant\n",
        drop=34,
        max_tokens=1024 + 34,
        max_sequence_length=512,
    )
    EDIT_TEXT = EDIT
    MAX_SIDE = 8192
    USES_CHAT_TEMPLATE = False
    NEGATIVE_PROMPT = None
    STRENGTHS: ClassVar[Mapping[str, float]] = {"image-to-image": 0.6, "inpaint": 0.6}
    TILING = Tiling(512, 128, is_close=True)  # Its norms are of each pixel; only the one attention sees the whole.

    def __init__(self, config: Config, where: str = MANIFEST) -> None:
        super().__init__(config, where)
        transformer, vae = config.get("transformer", {}), config.get("vae", {})
        self.transformer = decoded(transformer, Transformer, f"{where}: config.transformer", CheckpointError)
        encoder = config.get("text_encoder", {})
        self.vision = vision_tower(encoder, f"{where}: config.text_encoder") if "vision_config" in encoder else TOWER
        self.merge = self.vision.spatial_merge_size
        self.preprocessor = preprocessor(config.get("processor", {}), f"{where}: config.processor")
        self.vae = decoded(vae, Vae, f"{where}: config.vae", CheckpointError)

    @staticmethod
    def dynamic_dimensions(
        height: int, width: int, tokens: int, conditions: int = 0, frames: int = 1
    ) -> dict[str, int]:
        """The template's tokens are encoded, and then dropped."""
        image, text = frames * (height // 16) * (width // 16), max(1, tokens - QwenImage.TEXT.drop)
        return {
            "tokens": tokens,
            "text_tokens": text,
            "control_text_tokens": text,
            "control_all_tokens": text + image,
            "image_tokens": image,
            "condition_tokens": conditions,
            "joint_tokens": image + conditions,
            "all_tokens": text + image + conditions,
            "height": height // 8,
            "width": width // 8,
            "image_height": height,
            "image_width": width,
        }

    def base_sigmas(self, num_inference_steps: int) -> list[float] | None:
        """The schedule's own equal steps."""
        return None

    def noise_dtype(self, precision: str) -> str:
        """Noise is drawn in the type of the prompt embeddings, which is that of the weights."""
        return precision

    def noise_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """(frames, channels, height / 8, width / 8)."""
        return (frames, self.transformer.in_channels // 4, height // 8, width // 8)

    def from_noise(self, noise: Array) -> Array:
        """Latents are kept packed into tokens, (batch, tokens, 4 * channels), frame after frame."""
        packed = pack(noise.reshape(-1, *noise.shape[2:]), LAYOUT)
        return packed.reshape(len(noise), -1, packed.shape[2])

    def latents_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """(tokens, 4 * channels)."""
        return (frames * (height // 16) * (width // 16), self.transformer.in_channels)

    def to_vae(self, latents: Array, height: int, width: int) -> Array:
        """Unpack, and undo the VAE's normalization. Of several frames the first is the whole, which is left out."""
        tokens, features = self.latents_shape(height, width)
        frames = latents.reshape(len(latents), -1, tokens, features)
        layers = frames[:, 1:] if frames.shape[1] > 1 else frames
        packed = layers.reshape(-1, tokens, features)
        return denormalize(unpack(packed, LAYOUT, height // 8, width // 8), self.normalization)

    def denoiser_widths(self) -> tuple[int, int]:
        """A feed-forward is 4 times as wide."""
        width = self.transformer.num_attention_heads * self.transformer.attention_head_dim
        return width, 4 * width

    def denoiser_heads(self) -> int:
        """As its config has them."""
        return self.transformer.num_attention_heads

    def vision_widths(self) -> tuple[int, int]:
        """As its config has them."""
        return self.vision.hidden_size, self.vision.intermediate_size

    def vae_channels(self) -> int:
        """The last upsampler takes the channels of the level before, and halves them."""
        return self.vae.base_dim * self.vae.dim_mult[1]

    def conditioner_inputs(self, prompt_embeds: Array) -> Feeds:
        """The rows as they are."""
        return {"prompt_embeds": prompt_embeds[None]}

    def denoiser_constants(self, conditioning: Array, tokens: int, height: int, width: int) -> Feeds:
        """The prompt's tokens, and tables for text tokens followed by image tokens."""
        own = (height // 16, width // 16)
        positions = np.concatenate([text_positions(tokens, [own]), image_positions(*own)])
        cos, sin = tables(positions, self.transformer)
        return {"text": conditioning, "cos": cos, "sin": sin}

    def condition_tokens(self, grids: Sequence[tuple[int, int]], patches: Sequence[tuple[int, int]]) -> int:
        """Those of the latents; the text encoder has the others."""
        return sum(rows * columns for rows, columns in grids)

    def conditioned_constants(self, bundle: Bundle, text: Encoded, height: int, width: int, beside: Beside) -> Feeds:
        """Likewise, with the pictures' tokens last; those are modulated as at time 0 where they were trained so.

        Layers have the frames 0 and on, and what is taken apart has -1: ``QwenEmbedLayer3DRope`` of diffusers.
        """
        cos, sin = self._tables([text.tokens], (height // 16, width // 16), beside)
        return {"text": text.conditioning, "cos": cos, "sin": sin, **self._conditions(bundle, beside)}

    def _tables(self, lengths: Sequence[int], own: tuple[int, int], beside: Beside) -> Tables:
        """Of the tokens of prompts of these lengths, of what is drawn, and of the pictures beside it."""
        images = [image_positions(*own, frame) for frame in range(beside.frames)]
        for frame, other in enumerate(beside.grids, start=-1 if self.transformer.use_layer3d_rope else 1):
            sampled = beside.interpolated and other != own
            images.append(sampled_positions(*other, own, frame) if sampled else image_positions(*other, frame))
        least = len(images) - 1 if self.transformer.use_layer3d_rope else 0
        texts = [text_positions(length, [own, *beside.grids], least) for length in lengths]
        return tables(np.concatenate([*texts, *images]), self.transformer)

    def _conditions(self, bundle: Bundle, beside: Beside) -> Feeds:
        """The tokens of the pictures beside what is drawn, and their rows of modulation where they have some."""
        feeds: Feeds = {"condition": np.concatenate(beside.latents, axis=1)}
        if self.transformer.zero_cond_t:
            zero = np.zeros(1, np.float32)
            feeds["condition_modulation"] = self.schedule_inputs(bundle, zero)(0)["modulation"]
        return feeds

    def masked_constants(
        self,
        bundle: Bundle,
        segments: Sequence[Array],
        regions: NDArray[np.bool_],
        height: int,
        width: int,
        beside: Beside | None,
    ) -> Feeds:
        """All prompts' tokens, whose positions begin anew with each; and the mask of ``process_entity_masks``.

        Tokens of images see each other and the whole's prompt. Those of a region and its prompt see each other.

        Source: ``QwenImageDiT`` of DiffSynth-Studio 2.1, EliGen.
        """
        lengths = [segment.shape[1] for segment in segments]
        cos, sin = self._tables(lengths, (height // 16, width // 16), beside or Beside((), ()))
        of_whole = np.ones((1, regions.shape[1]), np.bool_)
        segment = np.repeat(np.arange(len(lengths)), lengths)
        seen = np.concatenate([regions, of_whole])[segment]
        tokens = regions.shape[1]
        mask = np.block([[segment[:, None] == segment, seen], [seen.T, np.ones((tokens, tokens), np.bool_)]])
        feeds = {"text": np.concatenate(segments, axis=1), "cos": cos, "sin": sin, "mask": mask}
        return feeds | (self._conditions(bundle, beside) if beside else {})

    def control_inputs(
        self, net: Control, given: ControlPictures, encode: Encode, text: Encoded, height: int, width: int
    ) -> Feeds:
        """The packed latents of a net's picture; with a mask, what it covers is black, and it is a channel more.

        Source: ``QwenImageUnit_BlockwiseControlNet`` of DiffSynth-Studio 2.1.
        """
        if net.kind == RESIDUAL:
            own = (height // 16, width // 16)
            positions = np.concatenate([text_positions(text.tokens, [own]), image_positions(*own)])
            cos, sin = tables(positions, self.transformer)
            prompt = {"prompt_embeds": np.concatenate(text.rows)[None], "cos": cos, "sin": sin}
            if given.mask is not None:
                # 0 or 1 at every pixel, as ``QwenImageControlNetInpaintPipeline`` of diffusers has it.
                levels = resize(given.mask.convert("L"), width, height).point(lambda level: 255 * (level > 127))
                given = replace(given, mask=levels.convert("RGB"))
            return prompt | self._control_latents(given, encode)
        return self._control_latents(given, encode)

    def control_step_inputs(self, net: Control, sigma: float) -> Feeds:
        """Nets with blocks of their own embed the time themselves."""
        times = network_time(np.array([sigma], np.float32))
        return {"sinusoids": time_embedding(times)} if net.kind == RESIDUAL else {}

    @staticmethod
    def _control_latents(given: ControlPictures, encode: Encode) -> Feeds:
        """The packed latents of a net's picture, and its mask."""
        if given.image is None:
            return {}
        if given.mask is None:
            return {"control": pack(encode(to_pixels(given.image)), LAYOUT)}
        covered = to_pixels(given.mask.resize(given.image.size)).mean(axis=1, keepdims=True) > 0
        latents = encode(np.where(covered, np.float32(-1), to_pixels(given.image)))
        mask = (to_pixels(given.mask).mean(axis=1, keepdims=True) + 1) / 2
        # The nearest of its pixels, as torch counts them: in float32.
        rows, columns = (
            (np.arange(few, dtype=np.float32) * np.float32(many / few)).astype(np.int64)
            for few, many in zip(latents.shape[2:], mask.shape[2:], strict=True)
        )
        kept = 1 - mask[:, :, rows[:, None], columns]
        return {"control": pack(np.concatenate([latents, kept], axis=1), LAYOUT)}

    def reading_dimensions(
        self, grids: Sequence[tuple[int, int]], patches: Sequence[tuple[int, int]]
    ) -> dict[str, int]:
        """Tokens of latents, and groups of patches."""
        of_text = sum(rows * columns for rows, columns in patches) // self.merge**2
        return {"condition_tokens": self.condition_tokens(grids, patches), "picture_tokens": of_text}

    def vision_dimensions(self, patches: tuple[int, int]) -> dict[str, int]:
        """Patches and windows."""
        window = self.vision.window * self.merge
        return {"patches": math.prod(patches), "windows": math.prod(-(-side // window) for side in patches)}

    def vision_grid(self, width: int, height: int) -> tuple[int, int]:
        """As ``Qwen2VLImageProcessor`` resizes it."""
        own = self.preprocessor
        rows, columns = smart_resize(height, width, own.patch_size * own.merge_size, *own.pixels())
        return rows // own.patch_size, columns // own.patch_size

    def vision_inputs(self, picture: Image) -> TowerInputs:
        """Patches in the order of windows."""
        return tower_inputs(merged_patches([picture], self.preprocessor), self.vision)

    def pictured_text_inputs(
        self, input_ids: NDArray[np.int64], image_token: int, rows: Sequence[Array], patches: Sequence[tuple[int, int]]
    ) -> Feeds:
        """Ids, tables of positions on three axes, the pictures' rows, and which token takes which row."""
        (ids,) = input_ids
        grids = np.array([(1, *grid) for grid in patches], np.int64).reshape(-1, 3)
        positions = token_positions(ids, image_token, grids, self.vision.spatial_merge_size)
        cos, sin = token_tables(positions, self.rope)
        is_image = ids == image_token
        index = np.where(is_image, len(ids) + np.cumsum(is_image) - 1, np.arange(len(ids)))
        return {
            "input_ids": input_ids,
            "cos": cos,
            "sin": sin,
            "picture_embeds": np.concatenate(rows),
            "row_index": index,
        }

    def schedule_inputs(self, bundle: Bundle, sigmas: Array, progress: Progress | None = None) -> StepInputs:
        """Each step's row of the modulation table."""
        table = modulation_table(bundle, MODULATION, sigmas, time_embedding(network_time(sigmas)), progress=progress)
        return lambda step: {"modulation": table[step]}

    def denoiser_inputs(self, latents: Array) -> Feeds:
        """The packed latents."""
        return {"hidden_states": latents}

    def velocity(self, output: Array, latents: Array) -> Array:
        """The network predicts the velocity of the packed latents."""
        return output

    @staticmethod
    def guidance_scale(cfg_scale: float) -> float:
        """The same number. DiffSynth does not rescale norms, so its pictures still differ."""
        return cfg_scale

    @staticmethod
    def cfg_scale(guidance_scale: float) -> float:
        """The same number."""
        return guidance_scale

    @staticmethod
    def is_guided(guidance_scale: float) -> bool:
        """Guidance is on above 1."""
        return guidance_scale > 1

    def guide(self, positive: Array, negative: Array, guidance_scale: float, cfg_normalization: float = 0.0) -> Array:
        """``neg + s (pos - neg)`` with the norm of each token kept, as ``QwenImagePipeline`` (``true_cfg_scale``).

        Those of layers are kept where ``cfg_normalization`` is not 0, as ``QwenImageLayeredPipeline`` does it.
        """
        if self.transformer.use_layer3d_rope and not cfg_normalization:
            return plain_guidance(positive, negative, guidance_scale)
        return norm_preserving_guidance(positive, negative, guidance_scale)


def network_time(sigmas: Sigmas) -> Sigmas:
    """The time that the network takes in, 1 at the start and 0 at the end; one or an array.

    It is sigma, but for the rounding on its way through thousandths.
    """
    return timesteps(sigmas) / np.float32(NUM_TRAIN_TIMESTEPS)


def time_embedding(times: Array) -> Array:
    """As ``get_timestep_embedding`` of diffusers makes it: 1000 x (time x frequency); (N,) -> float32 (N, 256)."""
    return sinusoids(np.float32(1000) * (times[:, None] * frequencies()))


def image_positions(height: int, width: int, frame: int = 0) -> NDArray[np.int64]:
    """Positions (frame, row, column) of an image's tokens, row by row, with the origin in the middle.

    As ``QwenEmbedRope`` of diffusers with ``scale_rope``.

    Args:
        height: rows of the token grid (a sixteenth of the picture's), such as 83.
        width: columns of the token grid.
        frame: 0 and on of what is drawn, 1 and on of pictures beside it, -1 of what is taken apart.

    Returns:
        int64 (height * width, 3).
    """
    return grid(frame, np.arange(height) - (height - height // 2), np.arange(width) - (width - width // 2))


def sampled_positions(height: int, width: int, of: tuple[int, int], frame: int) -> NDArray[np.int64]:
    """Positions of an image's tokens that span those of the picture that is drawn.

    As ``QwenEmbedRope.forward_sampling`` of DiffSynth-Studio 2.1: rows and columns of the other grid, evenly, rounded
    down in float32 as ``torch.linspace`` gives them.

    Args:
        height: rows of the token grid.
        width: columns of the token grid.
        of: rows and columns of the picture that is drawn.
        frame: 1 and on.

    Returns:
        int64 (height * width, 3).
    """
    rows, columns = (
        linspace(0, most - 1, count).astype(np.int64) for most, count in zip(of, (height, width), strict=True)
    )
    places = image_positions(*of, frame).reshape(*of, 3)
    return places[rows[:, None], columns].reshape(-1, 3)


def text_positions(length: int, grids: Sequence[tuple[int, int]], least: int = 0) -> NDArray[np.int64]:
    """Positions of text tokens: the same number on all axes, counting on from the edge of the largest image's grid.

    Args:
        length: text tokens.
        grids: rows and columns of each image's token grid.
        least: where they begin at the least.

    Returns:
        int64 (length, 3).
    """
    start = max(least, *(max(height // 2, width // 2) for height, width in grids))
    return np.repeat(np.arange(start, start + length)[:, None], 3, axis=1)


def tables(positions: NDArray[np.int64], transformer: Transformer) -> Tables:
    """Tables of positions (tokens, 3) for the transformer."""
    return axis_tables(positions, transformer.axes_dims_rope, THETA)
