"""Z-Image in the benchmarks: the configs are those of Tongyi-MAI/Z-Image-Turbo."""

from __future__ import annotations

from typing import Any

from families.base import BenchmarkFamily, Config, Configs, Controlling, arguments

CONFIGS: Configs = {
    "transformer": {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": 2560,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    },
    "text_encoder": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "max_position_embeddings": 40960,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "act_fn": "silu",
        "latent_channels": 16,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
    },
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": False,
        "shift": 3.0,
    },
}


def products(config: Config, image: int, text: int) -> int:
    """Image and caption each fill up to a multiple of 32 tokens."""
    dim = int(config["dim"])
    hidden, width = int(dim / 3 * 8), min(dim, 256)
    image, text = -(-image // 32) * 32, -(-text // 32) * 32
    layers, refiners, patch = int(config["n_layers"]), int(config["n_refiner_layers"]), 4 * int(config["in_channels"])

    def block(length: int) -> int:
        return 2 * length * (4 * dim**2 + 3 * dim * hidden) + 4 * length**2 * dim

    blocks = layers * block(image + text) + refiners * (block(image) + block(text))
    time = 2 * (256 * 1024 + 1024 * width) + 2 * width * dim * (4 * (layers + refiners) + 1)
    ends = 2 * image * patch * dim + 2 * (image + text) * dim * patch + 2 * text * int(config["cap_feat_dim"]) * dim
    return blocks + time + ends


CONTROL_CHANNELS = 33
"""Latents of a picture, a mask, and latents of what it leaves."""


def control_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Of release 2.1, with a control layer beside every other layer, as diffusers makes it on the meta device."""
    import torch
    from diffusers import ZImageControlNetModel

    with torch.device("meta"):
        net = ZImageControlNetModel(
            list(range(0, config["n_layers"], 2)),
            list(range(config["n_refiner_layers"])),
            CONTROL_CHANNELS,
            "control_noise_refiner",
            dim=config["dim"],
            n_refiner_layers=config["n_refiner_layers"],
            n_heads=config["n_heads"],
            n_kv_heads=config["n_kv_heads"],
        )
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


def control_products(config: Config, image: int, text: int) -> tuple[int, int]:
    """Blocks of the transformer's size, each with a projection of its hint; the first of either kind with another."""
    dim = int(config["dim"])
    hidden, width = int(dim / 3 * 8), min(dim, 256)
    image, text = -(-image // 32) * 32, -(-text // 32) * 32

    def blocks(count: int, length: int) -> int:
        block = 2 * length * (5 * dim**2 + 3 * dim * hidden) + 4 * length**2 * dim + 2 * width * 4 * dim
        return count * block + 2 * length * dim**2

    once = 2 * image * dim * (4 * CONTROL_CHANNELS + dim)
    embedder = 2 * image * dim * 4 * CONTROL_CHANNELS
    layers = len(range(0, config["n_layers"], 2))
    return blocks(layers, image + text) + blocks(int(config["n_refiner_layers"]), image) + embedder, once


def forward(network: Any, latents: Any, time: Any, prompt_embeds: Any, sides: tuple[int, int, int]) -> Any:
    """Lists go in and out."""
    return network([latents[0][:, None]], time, [prompt_embeds], return_dict=False)[0][0]


def velocity(out: Any) -> Any:
    """The network gives the negated velocity of (channels, frames, height, width)."""
    return -out[None, :, 0]


FAMILY = BenchmarkFamily(
    pipeline="ZImagePipeline",
    scale="guidance_scale",
    configs=CONFIGS,
    shards={"transformer": 3, "text_encoder": 3, "vae": 1},
    mid_size={
        "transformer": {"dim": 1280, "n_heads": 10, "n_kv_heads": 10, "n_layers": 8, "axes_dims": [32, 48, 48]},
        "text_encoder": {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        "vae": arguments(CONFIGS["vae"]),
    },
    # Feed-forwards of a multiple of 256; the tokens and heads of the text encoder it knows. What size a transformer
    # has is in its source, in src/z_image.hpp: the program has to be built with this one, and a cap_feat_dim of 1024.
    ggml_size={
        "transformer": {
            "dim": 1536,
            "n_heads": 12,
            "n_kv_heads": 12,
            "n_layers": 8,
            "n_refiner_layers": 2,
            "axes_dims": [32, 48, 48],
        },
        "text_encoder": {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        "vae": arguments(CONFIGS["vae"]),
    },
    deep={
        "dim": 256,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 60,
        "n_refiner_layers": 2,
        "axes_dims": [32, 48, 48],
    },
    tiny={
        "dim": 48,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 3,
        "n_kv_heads": 3,
        "cap_feat_dim": 32,
        "axes_dims": [8, 4, 4],
    },
    depth="n_layers",
    text_width="cap_feat_dim",
    products=products,
    time=lambda sigma: 1 - sigma,
    forward=forward,
    velocity=velocity,
    control=Controlling(control_shapes, control_products),
)
