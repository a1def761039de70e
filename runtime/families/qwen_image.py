"""Qwen-Image on the host side. Source: ``QwenImagePipeline`` and ``QwenImageTransformer2DModel`` of diffusers 0.42."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import TextConfig
from zimgkit.runtime.diffusion import guidance
from zimgkit.runtime.diffusion import positions as rope
from zimgkit.runtime.diffusion.latents import TokenLayout, denormalize, pack, unpack, vae_normalization

Array = NDArray[np.float32]
Config = dict[str, dict[str, Any]]

TEXT = TextConfig(
    prefix="<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    suffix="<|im_end|>\n<|im_start|>assistant\n",
    drop=34,
    max_tokens=1024 + 34,
    max_sequence_length=512,
)
MAX_SIDE = 8192
USES_CHAT_TEMPLATE = False
HAS_MODULATION_TABLE = True
NEGATIVE_PROMPT: str | None = None
LAYOUT: TokenLayout = "c ph pw"


def graph_sides(height: int, width: int, tokens: int) -> dict[str, int]:
    """The template's tokens are encoded, and then dropped."""
    image, text = (height // 16) * (width // 16), max(1, tokens - TEXT.drop)
    return {
        "tokens": tokens,
        "text_tokens": text,
        "image_tokens": image,
        "all_tokens": text + image,
        "height": height // 8,
        "width": width // 8,
    }


def base_sigmas(num_inference_steps: int) -> list[float] | None:
    """The schedule's own equal steps."""
    return None


def noise_dtype(precision: str) -> str:
    """Noise is drawn in the type of the prompt embeddings, which is that of the weights."""
    return precision


def noise_shape(config: Config, height: int, width: int) -> tuple[int, ...]:
    """(1 frame, channels, height / 8, width / 8)."""
    return (1, config["transformer"]["in_channels"] // 4, height // 8, width // 8)


def from_noise(noise: Array) -> Array:
    """Latents are kept packed into tokens, (batch, tokens, 4 * channels)."""
    return pack(noise[:, 0], LAYOUT)


def latents_shape(config: Config, height: int, width: int) -> tuple[int, ...]:
    """(tokens, 4 * channels)."""
    return ((height // 16) * (width // 16), config["transformer"]["in_channels"])


def to_vae(latents: Array, config: Config, height: int, width: int) -> Array:
    """Unpack, and undo the VAE's normalization."""
    return denormalize(unpack(latents, LAYOUT, height // 8, width // 8), vae_normalization(config["vae"]))


def conditioner_inputs(prompt_embeds: Array, config: Config) -> dict[str, NDArray[Any]]:
    """The rows as they are."""
    return {"prompt_embeds": prompt_embeds[None]}


def denoiser_constants(
    conditioning: Array, tokens: int, config: Config, height: int, width: int
) -> dict[str, NDArray[Any]]:
    """The prompt's tokens, and tables for text tokens followed by image tokens."""
    rows, columns = height // 16, width // 16
    text = rope.qwen_image_text_positions(tokens, rows, columns)
    positions = np.concatenate([text, rope.qwen_image_positions(rows, columns)])
    cos, sin = rope.qwen_image_tables(positions, config["transformer"])
    return {"text": conditioning, "cos": cos, "sin": sin}


def denoiser_inputs(
    latents: Array, sigma: np.float32, modulation: Array | None, config: Config
) -> dict[str, NDArray[Any]]:
    """The packed latents, and the step's row of the modulation table."""
    if modulation is None:
        raise TypeError("Qwen-Image's denoiser needs a row of the modulation table")
    return {"hidden_states": latents, "modulation": modulation}


def velocity(output: Array, latents: Array) -> Array:
    """The network predicts the velocity of the packed latents."""
    return output


guidance_scale = guidance.qwen_image_guidance_scale
cfg_scale = guidance.qwen_image_cfg_scale


def is_guided(guidance_scale: float, sigma: float, cfg_truncation: float) -> bool:
    """Guidance is on at every noise level, or at none."""
    return guidance.qwen_image_is_guided(guidance_scale)


def guide(positive: Array, negative: Array, guidance_scale: float, cfg_normalization: float) -> Array:
    """True classifier-free guidance with the norm of each token kept."""
    return guidance.qwen_image_guidance(positive, negative, guidance_scale)
