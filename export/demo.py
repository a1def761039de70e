"""Tiny checkpoints with random weights, in the diffusers layout, so that everything runs with no download.

The architectures are the real ones. Their pictures are patterns, for nothing was trained; they show that text, noise,
network and decoder are put together.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zimgkit.engines.bundle import atomic_folder
from zimgkit.engines.errors import UsageError
from zimgkit.engines.tensors import safetensors
from zimgkit.export.networks import autoencoder_kl, qwen_image, qwen_image_vae, z_image

Shapes = dict[str, tuple[int, ...]]

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Those of Qwen's tokenizers that templates use; the vocabulary before them is the 256 bytes."""
ROLES = {"unk_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
VOCABULARY = 256 + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Z_IMAGE: dict[str, dict[str, Any]] = {
    "model_index": {
        "_class_name": "ZImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": False,
    },
    "transformer": {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": 16,
        "dim": 128,
        "n_layers": 4,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "cap_feat_dim": 64,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
        "axes_dims": [16, 24, 24],
        "axes_lens": [1536, 512, 512],
    },
    "text_encoder": {
        "architectures": ["Qwen3Model"],
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [16, 16, 32, 32],
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 8,
        "sample_size": 128,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
        "act_fn": "silu",
    },
}
QWEN_IMAGE: dict[str, dict[str, Any]] = {
    "model_index": {
        "_class_name": "QwenImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
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
    "transformer": {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "joint_attention_dim": 64,
        "axes_dims_rope": [16, 24, 24],
        "guidance_embeds": False,
    },
    "text_encoder": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": 256 + SPECIAL_TOKENS.index("<|image_pad|>"),
        "video_token_id": 256 + SPECIAL_TOKENS.index("<|video_pad|>"),
        "vision_start_token_id": 256 + SPECIAL_TOKENS.index("<|vision_start|>"),
        "vision_end_token_id": 256 + SPECIAL_TOKENS.index("<|vision_end|>"),
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1000000.0},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [0],
        },
    },
    "vae": {
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": 16,
        "z_dim": 16,
        "dim_mult": [1, 1, 2, 2],
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
        "latents_mean": [round(0.1 * index - 0.8, 1) for index in range(16)],
        "latents_std": [round(1 + 0.1 * index, 1) for index in range(16)],
    },
}
CONFIGS = {"z-image": Z_IMAGE, "qwen-image": QWEN_IMAGE}
FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


def write_demo_checkpoint(folder: Path, family: str, *, seed: int = 0, overwrite: bool = False) -> None:
    """Write a tiny random checkpoint, float32, the same for the same seed.

    Args:
        folder: where; diffusers and ``zimg-export build`` both read it.
        family: ``"z-image"`` or ``"qwen-image"``.
        seed: of the weights.
        overwrite: replace a checkpoint that is there.

    Raises:
        UsageError: no such family.
        OutputError: the folder exists or cannot be written.
    """
    if family not in CONFIGS:
        raise UsageError(f"no family is called {family!r}", f"choose one of {', '.join(CONFIGS)}")
    configs = CONFIGS[family]
    with atomic_folder(folder.expanduser().absolute(), overwrite=overwrite, mark="model_index.json") as work:
        _write_json(work / "model_index.json", configs["model_index"])
        _write_json(work / "scheduler" / "scheduler_config.json", configs["scheduler"])
        _write_tokenizer(work / "tokenizer")
        for component, shapes in _tensors(family, configs).items():
            _write_json(work / component / "config.json", configs[component])
            safetensors.write(
                work / component / FILES[component],
                {name: ("float32", shape) for name, shape in shapes.items()},
                {name: [_random(name, shape, seed)] for name, shape in shapes.items()},
                {"format": "pt"},
            )


def _tensors(family: str, configs: Mapping[str, dict[str, Any]]) -> dict[str, Shapes]:
    transformer = z_image if family == "z-image" else qwen_image
    shapes: Shapes = {}
    for part in transformer.parts(configs["transformer"]).values():
        shapes |= part.parameters()
    return {
        "transformer": shapes,
        "text_encoder": _text_encoder_tensors(configs["text_encoder"]),
        "vae": _kl_tensors(configs["vae"]) if family == "z-image" else _video_tensors(configs["vae"]),
    }


def _kl_tensors(config: Mapping[str, Any]) -> Shapes:
    """A whole ``AutoencoderKL``."""
    with torch.device("meta"):
        halves = autoencoder_kl.AutoencoderKLDecoder(config), autoencoder_kl.AutoencoderKLEncoder(config)
    return {name: tuple(value.shape) for half in halves for name, value in half.state_dict().items()}


def _video_tensors(config: Mapping[str, Any]) -> Shapes:
    """A whole ``AutoencoderKLQwenImage`` with its temporal axes and the convolutions along time."""
    with torch.device("meta"):
        decoder, encoder = qwen_image_vae.QwenImageVAEDecoder(config), qwen_image_vae.QwenImageVAEEncoder(config)
    shapes: Shapes = {}
    # Upsamplers stand in the reverse order of downsamplers, and make two frames of one.
    for half, temporal, frames in ((encoder, 1, 1), (decoder, -1, 2)):
        shapes |= {name: tuple(value.shape) for name, value in half.state_dict().items()}
        shapes |= qwen_image_vae.video_shapes(half)
        resamplers = [name.removesuffix("resample.1.weight") for name in shapes if name.endswith("resample.1.weight")]
        own = [name for name in resamplers if name.startswith("encoder" if half is encoder else "decoder")]
        for name, is_temporal in zip(own, config["temperal_downsample"][::temporal], strict=True):
            if is_temporal:
                channels = shapes[f"{name}resample.1.weight"][1]
                shapes[f"{name}time_conv.weight"] = (frames * channels, channels, 3, 1, 1)
                shapes[f"{name}time_conv.bias"] = (frames * channels,)
    return shapes


def _text_encoder_tensors(config: Mapping[str, Any]) -> Shapes:
    """The whole model as its hub files name it, the parts that are dead for a picture among it."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3Config, Qwen3Model

    with torch.device("meta"):
        if config["model_type"] == "qwen3":
            model: Any = Qwen3Model(Qwen3Config.from_dict(dict(config)))
        else:
            model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(dict(config)))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    hub = {"model.language_model.": "model.", "model.visual.": "visual."}
    for modern, stored in hub.items():
        shapes = {stored + n.removeprefix(modern) if n.startswith(modern) else n: s for n, s in shapes.items()}
    return shapes


def _random(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Weights that keep activations near one: linears and convolutions by fan-in, norms at one, biases small."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = rng.standard_normal(shape, dtype=np.float32)
    if "pad_token" in name:
        return values
    if name.endswith("bias"):
        return np.float32(0.1) * values
    if len(shape) == 1 or "gamma" in name:
        return np.float32(1) + np.float32(0.1) * values
    return values / np.float32(np.sqrt(np.prod(shape[1:])))


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with Qwen's special tokens and no merges: a token is a byte."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocabulary = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary |= {token: len(vocabulary) + index for index, token in enumerate(SPECIAL_TOKENS)}
    tokenizer: Any = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        **ROLES,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
