"""Write a checkpoint of the real size that takes no disk: true configs, names, shapes and shards, holes for weights.

Every weight reads as zero. The tokenizer is the byte-level one of the tests.

    python benchmarks/sparse_checkpoint.py qwen-image /tmp/Qwen-Image
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import common

Shapes = dict[str, tuple[int, ...]]

Z_IMAGE = {
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

QWEN_IMAGE = {
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

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {"z-image": Z_IMAGE, "qwen-image": QWEN_IMAGE}
PIPELINES = {"z-image": "ZImagePipeline", "qwen-image": "QwenImagePipeline"}
NAMES = {"z-image": "Z-Image-Turbo", "qwen-image": "Qwen-Image"}
SHARDS = {
    "z-image": {"transformer": 3, "text_encoder": 3, "vae": 1},
    "qwen-image": {"transformer": 9, "text_encoder": 4, "vae": 1},
}
STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}


def write(
    family: str, folder: Path, *, stored: str = "bfloat16", overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> int:
    """Write a checkpoint in the diffusers layout.

    Args:
        family: ``"z-image"`` or ``"qwen-image"``.
        folder: an empty or new folder.
        stored: the element type of the transformer, ``"bfloat16"`` or ``"float32"``; the rest is bfloat16.
        overrides: component -> what its config has instead of the real one's, such as fewer layers.

    Returns:
        How many bytes of weights it seems to have.
    """
    configs = {name: config | dict((overrides or {}).get(name, {})) for name, config in CONFIGS[family].items()}
    total = 0
    for component, config in configs.items():
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        _write_json(folder / component / name, config)
        if component in STEMS:
            dtype = stored if component == "transformer" else "bfloat16"
            path = folder / component / f"{STEMS[component]}.safetensors"
            total += write_holes(path, dtype, shapes_of(component, config), SHARDS[family][component])
    common.reference().tokenizer().save_pretrained(folder / "tokenizer")
    _write_json(folder / "model_index.json", {"_class_name": PIPELINES[family]})
    return total


def shapes_of(component: str, config: Mapping[str, Any]) -> Shapes:
    """The names and shapes of a component's tensors as they are stored, from its reference class on the meta device."""
    import diffusers
    import torch
    import transformers

    with torch.device("meta"):
        if component == "text_encoder":
            kind = getattr(transformers, config["architectures"][0])
            module = kind(kind.config_class.from_dict(dict(config)))
        else:
            kind = getattr(diffusers, config["_class_name"])
            module = kind(**{key: value for key, value in config.items() if not key.startswith("_")})
    shapes = {_stored_name(name): tuple(value.shape) for name, value in module.state_dict().items()}
    if config.get("tie_word_embeddings"):
        del shapes["lm_head.weight"]
    return shapes


def _stored_name(name: str) -> str:
    """The files of Qwen2.5-VL have the names of older transformers."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def write_holes(path: Path, dtype: str, shapes: Shapes, shards: int) -> int:
    """Write safetensors headers, and files as long as the tensors would be.

    Args:
        path: the file, where one shard is all; shards and their index are named after it.
        dtype: the element type.
        shapes: name -> shape.
        shards: how many files.

    Returns:
        How many bytes of weights the files seem to have.
    """
    from zimgkit.engines.tensors.safetensors import layout

    weight_map: dict[str, str] = {}
    total = 0
    for index, names in enumerate(_split(shapes, shards), start=1):
        file = path if shards == 1 else path.with_name(f"{path.stem}-{index:05d}-of-{shards:05d}{path.suffix}")
        header, infos = layout(file, {name: (dtype, shapes[name]) for name in names}, {"format": "pt"})
        size = sum(info.nbytes for info in infos.values())
        with file.open("wb") as out:
            out.write(header)
            out.truncate(len(header) + size)
        weight_map |= dict.fromkeys(names, file.name)
        total += size
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(path.with_name(path.name + ".index.json"), index)
    return total


def _split(shapes: Shapes, shards: int) -> Iterator[list[str]]:
    """The names in order, in as many runs of about equal weight."""
    total = sum(math.prod(shape) for shape in shapes.values())
    runs: list[list[str]] = [[] for _ in range(shards)]
    done = 0
    for name, shape in shapes.items():
        runs[min(shards - 1, done * shards // total)].append(name)
        done += math.prod(shape)
    yield from runs


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=CONFIGS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stored", choices=["bf16", "fp32"], default="bf16", help="element type of the transformer")
    options = parser.parse_args()
    stored = {"bf16": "bfloat16", "fp32": "float32"}[options.stored]
    print(write(options.family, options.folder, stored=stored))


if __name__ == "__main__":
    main()
