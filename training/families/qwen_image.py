"""Qwen-Image in training. Source: ``QwenImagePipeline`` and ``QwenImageTransformer2DModel`` of diffusers 0.42.

The network is given sigma and predicts the velocity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zimgkit.export.networks.qwen_image_vae import halves
from zimgkit.runtime.families.qwen_image import QwenImage
from zimgkit.training.families.base import Configs, TrainingFamily
from zimgkit.training.families.qwen_image_beside import Blockwise, Regions, pack
from zimgkit.training.families.qwen_image_edit import EDITOR, encode_pictured, pictured_inputs
from zimgkit.training.loop import Settings
from zimgkit.training.prompts import pad

NEAR_PAIRS, NEAR_BIAS = 5, 3.0
"""How many of the fastest rotations, and how strongly, let heads of the text model look at tokens nearby, at first."""

CONFIGS: Configs = {
    "scheduler": {
        "base_image_seq_len": 256,
        "base_shift": 1.6,
        "max_image_seq_len": 8192,
        "max_shift": 2.0,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "shift_terminal": 0.02,
        "time_shift_type": "exponential",
        "use_dynamic_shifting": True,
    },
    "transformer": {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 5,
        "num_attention_heads": 3,
        "attention_head_dim": 32,
        "joint_attention_dim": 96,
        "axes_dims_rope": [8, 12, 12],
        "guidance_embeds": False,
    },
    "text_encoder": {
        "text_config": {
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1000000.0},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 96,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [0],
        },
        "tie_word_embeddings": True,
    },
    "vae": {
        "base_dim": 12,
        "z_dim": 16,
        "dim_mult": [1, 2, 2, 3],
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
    },
}
"""The autoencoder stores kernels of three frames, of which a still image uses one, so its width is halved."""


def start(tokenizer: Any, configs: Configs) -> Any:
    """An untrained pipeline."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text, channels = dict(configs["text_encoder"]), configs["vae"]["z_dim"]
    text["text_config"] = {**text["text_config"], "vocab_size": len(tokenizer)}
    for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
        key = f"{name.removesuffix('_pad')}_token_id"
        text[key] = tokenizer.convert_tokens_to_ids(f"<|{name}|>")
    return QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(**configs["scheduler"]),
        AutoencoderKLQwenImage(**{"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels, **configs["vae"]}),
        Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**text)),
        tokenizer,
        QwenImageTransformer2DModel(**configs["transformer"]),
    )


def look_nearby(text_encoder: Any) -> None:
    """Let all heads of a Qwen2.5 model but the last begin by attending to the token before, the one before that, ….

    Attention begins as an even mean. The template puts 34 tokens before a caption's first, so a noun would see next to
    nothing of its adjective, and no transformer learns to read what is not there. Biases of queries and keys alone make
    a logit that depends on the distance: a sum of cosines, one for each rotation that they are not zero in.
    """
    language_model = text_encoder.model.language_model
    for layer in language_model.layers:
        attention = layer.self_attn
        half, keys = attention.head_dim // 2, attention.k_proj.bias.data.view(-1, attention.head_dim)
        queries = attention.q_proj.bias.data.view(-1, attention.head_dim)
        speeds = language_model.rotary_emb.inv_freq[:NEAR_PAIRS]
        keys[:, :NEAR_PAIRS] = NEAR_BIAS
        for distance, query in enumerate(queries[:-1], start=1):
            query[:NEAR_PAIRS] = NEAR_BIAS * torch.cos(speeds * distance)
            query[half : half + NEAR_PAIRS] = -NEAR_BIAS * torch.sin(speeds * distance)


def encode(text_encoder: Any, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What comes out of the last layer's norm, without the head of the template."""
    model, drop = text_encoder.model.language_model, QwenImage.TEXT.drop
    rows = model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    return rows[:, drop:], mask[:, drop:]


def velocity(
    transformer: Any,
    latents: Tensor,
    sigmas: Tensor,
    prompt_embeds: Tensor,
    mask: Tensor,
    *,
    net: Any = None,
    control: Tensor | None = None,
    conditions: Sequence[Tensor] = (),
    regions: Tensor | None = None,
) -> Tensor:
    """Patches of 2x2 go in and out as tokens; those of other pictures follow."""
    batch, channels, height, width = latents.shape
    rows, columns = height // 2, width // 2
    pictures = [latents, *(condition.to(latents) for condition in conditions)]
    if net is not None and control is not None:
        net.see(control.to(latents))
    if regions is not None:
        transformer.regions.see(mask, regions)
    out: Tensor = transformer(
        hidden_states=torch.cat([pack(picture) for picture in pictures], dim=1),
        timestep=sigmas,
        encoder_hidden_states=prompt_embeds,
        encoder_hidden_states_mask=None if bool(mask.all()) else mask,
        img_shapes=[[(1, one.shape[2] // 2, one.shape[3] // 2) for one in pictures]] * batch,
        return_dict=False,
    )[0]
    out = out[:, : rows * columns].reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return out.reshape(batch, channels, height, width)


def attach_regions(transformer: Any) -> None:
    """EliGen's."""
    transformer.regions = Regions()
    transformer.regions.attach(transformer)


def freeze_unused_text(text_encoder: Any) -> None:
    """All but the language model."""
    text_encoder.requires_grad_(False)
    text_encoder.model.language_model.requires_grad_(True)


def unused_modules(transformer: Any) -> tuple[str, ...]:
    """The text stream ends in the last block."""
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}"
    return tuple(f"{last}.{name}" for name in ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp"))


def latents_statistics(count: Tensor, first: Tensor, second: Tensor) -> dict[str, Any]:
    """A mean and a deviation for each channel."""
    mean = first / count
    return {"latents_mean": mean.tolist(), "latents_std": (second / count - mean.square()).sqrt().tolist()}


def guided_call(positive: list[Tensor], negative: list[Tensor], scale: float) -> dict[str, Any]:
    """Embeddings go in padded, with masks."""
    arguments: dict[str, Any] = {"true_cfg_scale": scale}
    for name, texts in (("prompt_embeds", positive), ("negative_prompt_embeds", negative)):
        arguments[name], mask = pad(texts)
        arguments[f"{name}_mask"] = mask.to(arguments[name].device)
    return arguments


FAMILY = TrainingFamily(
    host=QwenImage,
    classes={
        "pipeline": "diffusers.QwenImagePipeline",
        "transformer": "diffusers.QwenImageTransformer2DModel",
        "vae": "diffusers.AutoencoderKLQwenImage",
        "text_encoder": "transformers.Qwen2_5_VLForConditionalGeneration",
    },
    autoencoder=halves,
    start=start,
    encode=encode,
    velocity=velocity,
    freeze_unused_text=freeze_unused_text,
    unused_modules=unused_modules,
    latents_statistics=latents_statistics,
    guided_call=guided_call,
    nets={"blockwise": Blockwise},
    attach_regions=attach_regions,
    takes_conditions=True,
    pictured_inputs=pictured_inputs,
    encode_pictured=encode_pictured,
    editor=EDITOR,
    # The pipeline takes a single space.
    no_prompts=(" ", ""),
    lora_targets="to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1",
    configs=CONFIGS,
    vae_settings=Settings(steps=2000, batch_size=8, learning_rate=3e-3, ema=0.995, warmup=50),
    diffusion_settings=Settings(steps=21000, batch_size=24, learning_rate=1.5e-3, warmup=300),
    demo_restart=13000,
    crops={32: 0.6, 64: 0.33, 128: 0.07},
    initialize_text=look_nearby,
)
