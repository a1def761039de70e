"""Checkpoints in the diffusers layout, made from nothing or from another with some components replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zimgkit.engines.bundle import atomic_folder
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.checkpoints.checkpoint import Checkpoint

MARK = "model_index.json"
LOG_VARIANCE = -6.0
"""Of an autoencoder's latents, at first."""
NEAR_PAIRS, NEAR_BIAS = 5, 3.0
"""How many of the fastest rotations, and how strongly, let heads of a text model look at tokens nearby, at first."""


def start_checkpoint(
    folder: Path,
    family: str,
    tokenizer: Any,
    configs: Mapping[str, Mapping[str, Any]],
    *,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write an untrained checkpoint.

    Args:
        folder: where.
        family: ``"z-image"`` or ``"qwen-image"``.
        tokenizer: of transformers, as ``train_tokenizer`` makes it.
        configs: of scheduler, transformer, text_encoder and vae; ids and the size of the vocabulary are filled in.
        seed: of the weights.
        overwrite: replace a checkpoint that is there.

    Raises:
        OutputError: the folder exists or cannot be written.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = (_z_image if family == "z-image" else _qwen_image)(tokenizer, configs)
        for part in (pipeline.transformer, pipeline.text_encoder):
            _initialize(part)
        if family == "qwen-image":
            _look_nearby(pipeline.text_encoder.model.language_model)
        _initialize_autoencoder(pipeline.vae)
    with atomic_folder(folder.expanduser().absolute(), overwrite=overwrite, mark=MARK) as work:
        pipeline.save_pretrained(work)


def _z_image(tokenizer: Any, configs: Mapping[str, Mapping[str, Any]]) -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    return ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(**configs["scheduler"]),
        AutoencoderKL(**{"scaling_factor": 1.0, "shift_factor": 0.0, **configs["vae"]}),
        Qwen3Model(Qwen3Config(**configs["text_encoder"], vocab_size=len(tokenizer))),
        tokenizer,
        ZImageTransformer2DModel(**configs["transformer"]),
    )


def _qwen_image(tokenizer: Any, configs: Mapping[str, Mapping[str, Any]]) -> Any:
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


def _initialize(network: nn.Module) -> None:
    """Weights to begin with: linears by their fan-in, and every block of the transformer begins as the identity.

    The identity comes from modulations of zero, so that gates are closed ("adaLN-Zero", Peebles and Xie, 2022,
    https://arxiv.org/abs/2212.09748), and so does a prediction of zero from the last projection.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            last = name == "proj_out" or (name.startswith("all_final_layer") and name.endswith(".linear"))
            if last or "_mod." in name or "adaLN_modulation" in name or name == "norm_out.linear":
                nn.init.zeros_(module.weight)
    for name, parameter in network.named_parameters():
        if name.endswith("pad_token") or "embed_tokens" in name:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


def _look_nearby(language_model: Any) -> None:
    """Let all heads of a Qwen2.5 model but the last begin by attending to the token before, the one before that, ….

    Attention begins as an even mean. Qwen-Image's template puts 34 tokens before a caption's first, so a noun would see
    next to nothing of its adjective, and no transformer learns to read what is not there. Biases of queries and keys
    alone make a logit that depends on the distance: a sum of cosines, one for each rotation that they are not zero in.
    """
    for layer in language_model.layers:
        attention = layer.self_attn
        half, keys = attention.head_dim // 2, attention.k_proj.bias.data.view(-1, attention.head_dim)
        queries = attention.q_proj.bias.data.view(-1, attention.head_dim)
        speeds = language_model.rotary_emb.inv_freq[:NEAR_PAIRS]
        keys[:, :NEAR_PAIRS] = NEAR_BIAS
        for distance, query in enumerate(queries[:-1], start=1):
            query[:NEAR_PAIRS] = NEAR_BIAS * torch.cos(speeds * distance)
            query[half : half + NEAR_PAIRS] = -NEAR_BIAS * torch.sin(speeds * distance)


def _initialize_autoencoder(vae: nn.Module) -> None:
    """Convolutions by their fan-in on a still image, no biases, and latents with little noise.

    So colours get through, which are learned last: most of what pictures differ in is how light they are.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            _, channels, *kernel = module.weight.shape
            nn.init.normal_(module.weight, std=(channels * kernel[-2] * kernel[-1]) ** -0.5)
            if module.bias is None:
                continue
            nn.init.zeros_(module.bias)
            if name == "quant_conv" or (name == "encoder.conv_out" and getattr(vae, "quant_conv", None) is None):
                module.bias.data[len(module.bias) // 2 :] = LOG_VARIANCE


def derive_checkpoint(
    source: Path, target: Path, components: Mapping[str, Any], *, precision: str = "bfloat16", overwrite: bool = False
) -> None:
    """Write a checkpoint that is another one but for some components.

    Args:
        source: a checkpoint's folder.
        target: where.
        components: what is replaced, by name: models of diffusers or transformers.
        precision: the element type they are stored in.
        overwrite: replace a checkpoint that is there.

    Raises:
        OutputError: the folder exists or cannot be written.
    """
    with atomic_folder(target.expanduser().absolute(), overwrite=overwrite, mark=MARK) as work:
        shutil.copytree(source, work, dirs_exist_ok=True, ignore=lambda _, names: set(names) & set(components))
        for name, model in components.items():
            model.to(getattr(torch, precision)).save_pretrained(work / name)
            _forget_path(work / name / "config.json")


def _forget_path(config: Path) -> None:
    """Take out of a config where its model was loaded from: a place on this machine."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n")


def load_component(checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """One component of a checkpoint as the reference's own model, in the given element type.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    import diffusers
    import transformers

    classes = {
        ("z-image", "transformer"): diffusers.ZImageTransformer2DModel,
        ("z-image", "vae"): diffusers.AutoencoderKL,
        ("z-image", "text_encoder"): transformers.Qwen3Model,
        ("qwen-image", "transformer"): diffusers.QwenImageTransformer2DModel,
        ("qwen-image", "vae"): diffusers.AutoencoderKLQwenImage,
        ("qwen-image", "text_encoder"): transformers.Qwen2_5_VLForConditionalGeneration,
    }
    folder = checkpoint.root / name
    try:
        model = classes[checkpoint.family, name].from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # both libraries raise whatever their parsers raise
        raise CheckpointError(f"{folder} cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    return model


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """A checkpoint's tokenizer.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = checkpoint.root / "tokenizer"
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise CheckpointError(f"{folder} cannot be loaded ({' '.join(str(error).split())[:200]})") from None
