"""Z-Image on the host side. Source: ``ZImagePipeline`` and ``ZImageTransformer2DModel`` of diffusers 0.42."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import TextConfig
from zimgkit.runtime.diffusion import guidance, schedule
from zimgkit.runtime.diffusion import positions as rope
from zimgkit.runtime.diffusion.latents import TokenLayout, denormalize, pack, unpack, vae_normalization
from zimgkit.runtime.diffusion.time_embedding import z_image_time_embedding

Array = NDArray[np.float32]
Config = dict[str, dict[str, Any]]

TEXT = TextConfig(
    prefix="<|im_start|>user\n",
    suffix="<|im_end|>\n<|im_start|>assistant\n",
    drop=0,
    max_tokens=1024,
    max_sequence_length=512,
)
MAX_SIDE = 8192
USES_CHAT_TEMPLATE = True
HAS_MODULATION_TABLE = False
NEGATIVE_PROMPT: str | None = ""
LAYOUT: TokenLayout = "ph pw c"


def graph_sides(height: int, width: int, tokens: int) -> dict[str, int]:
    """Image and caption each fill up to a multiple of 32 tokens."""
    image, caption = (rope.z_image_padded(count) for count in ((height // 16) * (width // 16), tokens))
    return {
        "tokens": tokens,
        "caption_tokens": caption,
        "image_tokens": image,
        "all_tokens": image + caption,
        "height": height // 8,
        "width": width // 8,
    }


def base_sigmas(num_inference_steps: int) -> list[float] | None:
    """Equal steps, rounded as torch's linspace does."""
    return schedule.linspace_float32(num_inference_steps)


def noise_dtype(precision: str) -> str:
    """Noise is drawn in float32, whatever the weights are in."""
    return "float32"


def noise_shape(config: Config, height: int, width: int) -> tuple[int, ...]:
    """(channels, height / 8, width / 8)."""
    return (config["transformer"]["in_channels"], height // 8, width // 8)


latents_shape = noise_shape


def from_noise(noise: Array) -> Array:
    """Latents are kept as (batch, channels, height / 8, width / 8)."""
    return noise


def to_vae(latents: Array, config: Config, height: int, width: int) -> Array:
    """Undo the VAE's scaling."""
    return denormalize(latents, vae_normalization(config["vae"]))


def conditioner_inputs(prompt_embeds: Array, config: Config) -> dict[str, NDArray[Any]]:
    """Pad the caption to a multiple of 32 tokens; the pads' rows are replaced by a learned token in the network."""
    tokens = len(prompt_embeds)
    pad = rope.z_image_pad_mask(tokens)
    padded = np.zeros((1, len(pad), prompt_embeds.shape[1]), np.float32)
    padded[0, :tokens] = prompt_embeds
    cos, sin = rope.z_image_tables(rope.z_image_caption_positions(tokens), config["transformer"])
    return {"prompt_embeds": padded, "cos": cos, "sin": sin, "pad": pad}


def denoiser_constants(
    conditioning: Array, tokens: int, config: Config, height: int, width: int
) -> dict[str, NDArray[Any]]:
    """The refined caption, and tables for image tokens followed by caption tokens."""
    rows, columns = height // 16, width // 16
    image = rope.z_image_positions(rows, columns, tokens)
    positions = np.concatenate([image, rope.z_image_caption_positions(tokens)])
    cos, sin = rope.z_image_tables(positions, config["transformer"])
    return {"caption": conditioning, "cos": cos, "sin": sin, "pad": rope.z_image_pad_mask(rows * columns)}


def denoiser_inputs(
    latents: Array, sigma: np.float32, modulation: Array | None, config: Config
) -> dict[str, NDArray[Any]]:
    """Patches padded to a multiple of 32 tokens, and sinusoids of the time, which runs from 0 (noise) to 1."""
    patches = pack(latents, LAYOUT)
    batch, tokens, features = patches.shape
    padded = np.zeros((batch, rope.z_image_padded(tokens), features), np.float32)
    padded[:, :tokens] = patches
    times = np.array([schedule.z_image_time(sigma)], np.float32)
    return {"hidden_states": padded, "sinusoids": z_image_time_embedding(times, config["transformer"]["t_scale"])}


def velocity(output: Array, latents: Array) -> Array:
    """The network predicts the negated velocity, patch by patch; pads are dropped."""
    _, _, height, width = latents.shape
    return -unpack(output[:, : height * width // 4], LAYOUT, height, width)


guidance_scale = guidance.z_image_guidance_scale
cfg_scale = guidance.z_image_cfg_scale
is_guided = guidance.z_image_is_guided
guide = guidance.z_image_guidance
