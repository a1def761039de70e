"""The tiny checkpoints that recordings are made with, the same to the bit wherever they are written.

A weight is drawn by its name from numpy's ``RandomState``, whose stream does not change, so no weights are kept.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import ZImageControlNetModel
from safetensors.torch import load_file, save_file

from tests import reference

LORA_RANK = 4
LORA_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_out.0", "attn.to_add_out", "img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1",
)  # fmt: skip
"""What DiffSynth's own LoRAs adapt in each block."""


class Checkpoint(NamedTuple):
    """What :mod:`tests.reference` makes it with."""

    family: str
    config: dict[str, dict[str, Any]]
    edits: bool = False
    """Whether it is one of ``QwenImageEditPipeline``, with a processor of pictures."""
    controlnet: dict[str, Any] | None = None
    """What ``ZImageControlNetModel`` of diffusers is made with that lies beside it, in the release's keys."""
    blockwise: dict[str, int] = {}  # noqa: RUF012
    """The Blockwise ControlNets in its folder ``controlnet`` -> the features of a token that each takes."""


# DiffSynth has 16 channels of latents, and the numbers of the VAEs' blocks, written into its code.
QWEN_IMAGE: dict[str, dict[str, Any]] = {
    "transformer": {"in_channels": 64, "out_channels": 16},
    "vae": {
        "z_dim": 16,
        "latents_mean": [round(0.4 * math.sin(channel), 2) for channel in range(16)],
        "latents_std": [round(1.5 + 0.5 * math.cos(channel), 2) for channel in range(16)],
    },
    "vision": {"depth": 2, "fullatt_block_indexes": [1]},
}
Z_IMAGE: dict[str, dict[str, Any]] = {"vae": {"block_out_channels": (16, 8, 16, 16), "layers_per_block": 2}}
CONTROLNET = "controlnet/union.safetensors"
"""Where a ControlNet lies in the folder of its checkpoint; bundles call it as the file."""
CHECKPOINTS = {
    "z-image": Checkpoint("z-image", Z_IMAGE),
    "z-image-control": Checkpoint(
        "z-image",
        Z_IMAGE | {"transformer": {"n_layers": 4, "n_refiner_layers": 2}},
        controlnet={
            "control_layers_places": [0, 2],
            "control_refiner_layers_places": [0, 1],
            "control_in_dim": 33,
            "add_control_noise_refiner": "control_noise_refiner",
            "dim": 48,
            "n_heads": 3,
            "n_kv_heads": 3,
        },
    ),
    "qwen-image": Checkpoint("qwen-image", QWEN_IMAGE),
    "qwen-image-edit": Checkpoint("qwen-image", QWEN_IMAGE, edits=True),
    "qwen-image-control": Checkpoint("qwen-image", QWEN_IMAGE, blockwise={"canny": 64, "depth": 64, "inpaint": 68}),
}


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal noise that belongs to a name: float32."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def write(name: str, folder: Path) -> Path:
    """Write a checkpoint in diffusers' layout.

    Args:
        name: one of ``CHECKPOINTS``.
        folder: where to.
    """
    checkpoint = CHECKPOINTS[name]
    reference.save(reference.FAMILIES[checkpoint.family](**checkpoint.config), folder)
    for file in sorted(folder.glob("*/*.safetensors")):
        weights = {
            key: torch.from_numpy(reference.scaled(key, drawn(key, tuple(value.shape)))).contiguous()
            for key, value in load_file(file).items()
        }
        save_file(weights, file, metadata={"format": "pt"})
    if checkpoint.edits:
        _add_processor(folder)
    if checkpoint.controlnet is not None:
        _add_controlnet(name, checkpoint.controlnet, folder / CONTROLNET)
    for net, features in checkpoint.blockwise.items():
        write_blockwise(net, folder, folder / "controlnet" / f"{net}.safetensors", features)
    return folder


def write_lora(name: str, checkpoint: Path, file: Path) -> Path:
    """Write a LoRA for a checkpoint's transformer in DiffSynth's keys: no prefix, no alpha.

    Args:
        name: another name is another LoRA.
        checkpoint: the folder of the checkpoint.
        file: where to.
    """
    weights = {}
    for key, value in load_file(checkpoint / "transformer/diffusion_pytorch_model.safetensors").items():
        module = key.removesuffix(".weight")
        if value.ndim == 2 and module.endswith(LORA_TARGETS):
            rows, columns = value.shape
            down, up = f"{module}.lora_A.default.weight", f"{module}.lora_B.default.weight"
            weights[down] = drawn(name + down, (LORA_RANK, columns)) * columns**-0.5
            weights[up] = drawn(name + up, (rows, LORA_RANK)) * 0.3 * LORA_RANK**-0.5
    save_file({key: torch.from_numpy(value.astype(np.float32)) for key, value in weights.items()}, file)
    return file


def _add_controlnet(name: str, config: dict[str, Any], file: Path) -> None:
    shapes = {key: tuple(value.shape) for key, value in ZImageControlNetModel(**config).state_dict().items()}
    file.parent.mkdir()
    weights = {
        key: torch.from_numpy(reference.scaled(key, drawn(f"{name}.{key}", shape))) for key, shape in shapes.items()
    }
    save_file({key: value.contiguous() for key, value in weights.items()}, file, metadata={"format": "pt"})


def blockwise_shapes(config: Mapping[str, Any], features: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Blockwise ControlNet for a transformer of this config."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    shapes = {"img_in.weight": (dim, features), "img_in.bias": (dim,)}
    for index in range(config["num_layers"]):
        block = f"controlnet_blocks.{index}."
        shapes |= {f"{block}{norm}.weight": (dim,) for norm in ("x_rms", "y_rms")}
        for linear in ("input_proj", "output_proj"):
            shapes |= {f"{block}{linear}.weight": (dim, dim), f"{block}{linear}.bias": (dim,)}
    return shapes


def write_blockwise(name: str, checkpoint: Path, file: Path, features: int) -> Path:
    """Write a Blockwise ControlNet for a checkpoint's transformer.

    Args:
        name: another name is another net.
        checkpoint: the folder of the checkpoint.
        file: where to.
        features: of a token that it takes: 64, or 68 with a mask.
    """
    shapes = blockwise_shapes(json.loads((checkpoint / "transformer/config.json").read_text()), features)
    file.parent.mkdir(exist_ok=True)
    weights = {key: reference.scaled(key, drawn(f"{name}.{key}", shape)) for key, shape in shapes.items()}
    save_file({key: torch.from_numpy(value).contiguous() for key, value in weights.items()}, file)
    return file


I2L = {"siglip": 24, "dinov3": 32}
"""How wide the encoders are of what makes LoRAs of pictures: 1536 and 4096 in the release."""
SIGLIP = {
    "hidden_size": I2L["siglip"], "intermediate_size": 48, "image_size": 384, "patch_size": 16,
    "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
DINOV3 = {
    "hidden_size": I2L["dinov3"], "intermediate_size": 64, "image_size": 224, "patch_size": 16,
    "num_attention_heads": 2, "num_hidden_layers": 2, "num_register_tokens": 4, "hidden_act": "silu",
    "use_gated_mlp": True, "mlp_bias": True, "key_bias": False, "query_bias": False, "value_bias": False,
    "proj_bias": True, "layerscale_value": 1.0, "layer_norm_eps": 1e-5, "rope_theta": 100.0, "pos_embed_rescale": 2.0,
}  # fmt: skip
I2L_RANK, I2L_COMPRESSED = 4, 8


def write_i2l(checkpoint: Path, folder: Path) -> Path:
    """Write what makes LoRAs of pictures for a checkpoint, as its release has it: three folders of a file each.

    Args:
        checkpoint: the folder of the checkpoint.
        folder: where to.
    """
    from transformers import DINOv3ViTConfig, DINOv3ViTModel, SiglipVisionConfig, SiglipVisionModel

    siglip = SiglipVisionModel(SiglipVisionConfig(**SIGLIP)).state_dict()
    dinov3 = DINOv3ViTModel(DINOv3ViTConfig(**DINOV3)).state_dict()
    shapes = {
        "siglip": {key: tuple(value.shape) for key, value in siglip.items()},
        # The release has them as the first transformers with this network had.
        "dinov3": {key.removeprefix("model."): tuple(value.shape) for key, value in dinov3.items()},
        "i2l": generator_shapes(json.loads((checkpoint / "transformer/config.json").read_text())),
    }
    for name, own in shapes.items():
        (folder / name).mkdir(parents=True)
        gain = 0.5 if name == "i2l" else 1.0
        weights = {key: gain * reference.scaled(key, drawn(f"{name} {key}", shape)) for key, shape in own.items()}
        save_file(
            {key: torch.from_numpy(value.astype(np.float32)) for key, value in weights.items()},
            folder / name / "model.safetensors",
        )
    # Which the release has not: nothing else tells the number of heads.
    (folder / "siglip/config.json").write_text(json.dumps(SIGLIP))
    (folder / "dinov3/config.json").write_text(json.dumps(DINOV3))
    return folder


def generator_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a generator for a transformer of this config."""
    dim, hidden = config["dim"], int(config["dim"] / 3 * 8)
    patterns = (4 * [(dim, dim)], [(dim, hidden), (hidden, dim), (dim, hidden)])
    counts = {"layers": config["n_layers"]} | dict.fromkeys(
        ("context_refiner", "noise_refiner"), config["n_refiner_layers"]
    )
    shapes = {}
    for group, count in counts.items():
        for block in range(2 * count):
            for layer, sides in enumerate(patterns[block // count]):
                for side, width in zip("ab", sides, strict=True):
                    start = f"{group}_lora.blocks.{block}.layers.{layer}.proj_{side}"
                    shapes[f"{start}.proj_in.weight"] = (I2L_COMPRESSED, sum(I2L.values()))
                    shapes[f"{start}.proj_out.weight"] = (width * I2L_RANK, I2L_COMPRESSED)
    return shapes


def _add_processor(folder: Path) -> None:
    """Make it one that edits; the files are written as the releases have them, as transformers needs torchvision."""
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "QwenImageEditPipeline", "processor": ["transformers", "Qwen2VLProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    shutil.copytree(folder / "tokenizer", folder / "processor")
    limits = {"min_pixels": 56 * 56, "max_pixels": 12_845_056}
    config = limits | {
        "size": {"shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]},
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": "Qwen2VLProcessor",
    }
    for file, kind in (
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor"}),
        ("video_preprocessor_config.json", {"video_processor_type": "Qwen2VLVideoProcessor"}),
    ):
        (folder / "processor" / file).write_text(json.dumps(config | kind, indent=2))
