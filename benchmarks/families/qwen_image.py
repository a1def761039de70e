"""Qwen-Image in the benchmarks: the configs are those of Qwen/Qwen-Image."""

from __future__ import annotations

from typing import Any

from families.base import BenchmarkFamily, Config, Configs, Controlling, Editing, arguments

CONFIGS: Configs = {
    "transformer": {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "joint_attention_dim": 3584,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": False,
    },
    "text_encoder": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        "max_position_embeddings": 128000,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "out_hidden_size": 3584,
        },
    },
    "vae": {
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": 96,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
        "latents_mean": [
            -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
        ],
        "latents_std": [
            2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
        ],
    },
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 8192,
        "max_shift": 0.9,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "shift_terminal": 0.02,
        "time_shift_type": "exponential",
        "use_dynamic_shifting": True,
    },
}  # fmt: skip


def products(config: Config, image: int, text: int) -> int:
    """The modulation is computed anew in each step."""
    dim = int(config["num_attention_heads"] * config["attention_head_dim"])
    length, layers = image + text, int(config["num_layers"])
    block = 2 * length * (4 * dim**2 + 2 * dim * 4 * dim) + 4 * length**2 * dim
    modulation = 2 * 2 * dim * 6 * dim
    time = 2 * (256 * dim + dim**2) + 2 * dim * 2 * dim
    ends = 2 * image * dim * int(config["in_channels"] + 4 * config["out_channels"])
    return layers * (block + modulation) + time + ends + 2 * text * int(config["joint_attention_dim"]) * dim


def control_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Of a Blockwise net without a mask."""
    dim = int(config["num_attention_heads"] * config["attention_head_dim"])
    shapes: dict[str, tuple[int, ...]] = {"img_in.weight": (dim, config["in_channels"]), "img_in.bias": (dim,)}
    for index in range(config["num_layers"]):
        block = f"controlnet_blocks.{index}."
        shapes |= {f"{block}{norm}.weight": (dim,) for norm in ("x_rms", "y_rms")}
        for linear in ("input_proj", "output_proj"):
            shapes |= {f"{block}{linear}.weight": (dim, dim), f"{block}{linear}.bias": (dim,)}
    return shapes


def control_products(config: Config, image: int, text: int) -> tuple[int, int]:
    """Two linears after each block, and the projection of the picture's latents."""
    dim = int(config["num_attention_heads"] * config["attention_head_dim"])
    once = 2 * image * dim * int(config["in_channels"])
    return int(config["num_layers"]) * 2 * image * 2 * dim**2 + once, once


def forward(network: Any, latents: Any, time: Any, prompt_embeds: Any, sides: tuple[int, int, int]) -> Any:
    """Packed tokens go in and out."""
    return network(
        hidden_states=latents,
        encoder_hidden_states=prompt_embeds[None],
        timestep=time,
        img_shapes=[[sides]],
        return_dict=False,
    )[0]


FAMILY = BenchmarkFamily(
    pipeline="QwenImagePipeline",
    scale="true_cfg_scale",
    configs=CONFIGS,
    shards={"transformer": 9, "text_encoder": 4, "vae": 1},
    mid_size={
        "transformer": {
            "num_attention_heads": 10,
            "attention_head_dim": 128,
            "axes_dims_rope": (16, 56, 56),
            "num_layers": 4,
            "in_channels": 64,
            "out_channels": 16,
        },
        "text_encoder": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        },
        "vae": arguments(CONFIGS["vae"]),
    },
    ggml_size=None,
    deep={"num_attention_heads": 2, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56), "num_layers": 60},
    tiny={
        "num_layers": 2,
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "joint_attention_dim": 32,
        "axes_dims_rope": [8, 4, 4],
    },
    depth="num_layers",
    text_width="joint_attention_dim",
    products=products,
    time=lambda sigma: sigma,
    forward=forward,
    velocity=lambda out: out,
    control=Controlling(control_shapes, control_products),
    editing=Editing(
        pipeline="QwenImageEditPlusPipeline",
        reference="qwen-image-edit-plus",
        configs={
            "vision": {
                "depth": 8,
                "hidden_size": 640,
                "intermediate_size": 1710,
                "num_heads": 8,
                "fullatt_block_indexes": [3, 7],
            }
        },
        areas=("CONDITION_IMAGE_SIZE", "VAE_IMAGE_SIZE"),
    ),
)
