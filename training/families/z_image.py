"""Z-Image in training. Source: ``ZImagePipeline`` and ``ZImageTransformer2DModel`` of diffusers 0.42.

The network is given 1 - sigma and predicts the negated velocity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zimgkit.export.networks.autoencoder_kl import halves
from zimgkit.runtime.families.z_image import ZImage
from zimgkit.training.families.base import Configs, TrainingFamily
from zimgkit.training.families.z_image_beside import Fun
from zimgkit.training.loop import Settings

CONFIGS: Configs = {
    "scheduler": {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False},
    "transformer": {
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": 16,
        "dim": 128,
        "n_layers": 4,
        "n_refiner_layers": 1,
        "n_heads": 4,
        "n_kv_heads": 4,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": 96,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [8, 12, 12],
        "axes_lens": [1536, 512, 512],
    },
    "text_encoder": {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "vae": {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [16, 24, 40, 48],
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 1,
        "sample_size": 128,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
        "act_fn": "silu",
    },
}
"""The last of the text model's layers is unused, as in the real checkpoint: the pipeline reads what goes into it."""


def start(tokenizer: Any, configs: Configs) -> Any:
    """An untrained pipeline."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    return ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(**configs["scheduler"]),
        AutoencoderKL(**{"scaling_factor": 1.0, "shift_factor": 0.0, **configs["vae"]}),
        Qwen3Model(Qwen3Config(**configs["text_encoder"], vocab_size=len(tokenizer))),
        tokenizer,
        ZImageTransformer2DModel(**configs["transformer"]),
    )


def encode(text_encoder: Any, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into the last layer."""
    states = text_encoder(input_ids=input_ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return states.hidden_states[-2], mask


def velocity(
    transformer: Any,
    latents: Tensor,
    sigmas: Tensor,
    prompt_embeds: Tensor,
    mask: Tensor,
    *,
    net: Any = None,
    control: Tensor | None = None,
) -> Tensor:
    """Lists go in and out. Pads up to 32 tokens are the network's own; those of the batch must not be there at all."""
    if net is not None and control is not None:
        net.see(control.to(latents))
    captions = [rows[: int(keep.sum())] for rows, keep in zip(prompt_embeds, mask, strict=True)]
    pictures = list(latents.unsqueeze(2))
    return -torch.stack(transformer(pictures, 1 - sigmas, captions, return_dict=False)[0]).squeeze(2)


def freeze_unused_text(text_encoder: Any) -> None:
    """The last layer, and the norm after it."""
    text_encoder.layers[-1].requires_grad_(False)
    text_encoder.norm.requires_grad_(False)


def unused_modules(transformer: Any) -> tuple[str, ...]:
    """All are used."""
    return ()


def latents_statistics(count: Tensor, first: Tensor, second: Tensor) -> dict[str, Any]:
    """One factor and one shift for all channels."""
    mean = first.sum() / count.sum()
    std = (second.sum() / count.sum() - mean.square()).sqrt()
    return {"scaling_factor": float(1 / std), "shift_factor": float(mean)}


def guided_call(positive: list[Tensor], negative: list[Tensor], scale: float) -> dict[str, Any]:
    """Embeddings go in as lists."""
    return {"prompt_embeds": positive, "negative_prompt_embeds": negative, "guidance_scale": scale}


FAMILY = TrainingFamily(
    host=ZImage,
    classes={
        "pipeline": "diffusers.ZImagePipeline",
        "transformer": "diffusers.ZImageTransformer2DModel",
        "vae": "diffusers.AutoencoderKL",
        "text_encoder": "transformers.Qwen3Model",
    },
    autoencoder=halves,
    start=start,
    encode=encode,
    velocity=velocity,
    freeze_unused_text=freeze_unused_text,
    unused_modules=unused_modules,
    latents_statistics=latents_statistics,
    guided_call=guided_call,
    nets={"fun": Fun},
    no_prompts=("",),
    lora_targets="to_q,to_k,to_v,to_out.0,w1,w2,w3",
    configs=CONFIGS,
    vae_settings=Settings(steps=2000, batch_size=4, learning_rate=3e-3, ema=0.995, warmup=50),
    diffusion_settings=Settings(steps=12000, batch_size=24, learning_rate=1.5e-3, warmup=300),
    # The autoencoder's norms are over all pixels, and learn most from whole pictures.
    crops={64: 0.7, 128: 0.3},
)
