"""Throw-away pictures and models that train in a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {"red": "#d42a2a", "green": "#2aa52a", "blue": "#2a4ad4"}

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "z-image": {
        "scheduler": {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False},
        "transformer": {
            "all_patch_size": [2],
            "all_f_patch_size": [1],
            "in_channels": 4,
            "dim": 48,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 3,
            "n_kv_heads": 3,
            "norm_eps": 1e-5,
            "qk_norm": True,
            "cap_feat_dim": 32,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": [8, 4, 4],
            "axes_lens": [1536, 512, 512],
        },
        "text_encoder": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        "vae": {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [8, 8, 16, 16],
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 32,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    },
    "qwen-image": {
        "scheduler": {
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
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 32,
            "axes_dims_rope": [8, 4, 4],
        },
        "text_encoder": {
            "text_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
                "bos_token_id": None,
                "eos_token_id": None,
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 112,
                "fullatt_block_indexes": [0],
            },
            "tie_word_embeddings": True,
        },
        "vae": {
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 1, 2, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True, True],
        },
    },
}
"""Family -> component -> config."""


def dataset(folder: Path, sizes: Sequence[tuple[int, int]] = ((32, 32),), count: int = 6) -> Path:
    """A folder of discs and boxes, (height, width) by turns, with English and Chinese captions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["image,prompt"]
    for index in range(count):
        height, width = sizes[index % len(sizes)]
        name = list(COLOURS)[index % len(COLOURS)]
        picture = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(picture)
        box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
        (draw.ellipse if index % 2 else draw.rectangle)(box, fill=COLOURS[name])
        picture.save(folder / f"{index}.png")
        shape = "circle" if index % 2 else "square"
        lines.append(f'{index}.png,"a {name} {shape}, large"' if index % 3 else f"{index}.png,一个{name}的{shape}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
