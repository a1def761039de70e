"""The numbers of the two demo models: the real architectures, narrower and shallower, three million parameters each.

Where the parameters go: about two thirds to the transformer, for composing is what is hard; a sixth to the text model,
whose language is small; the rest to the autoencoder. Its norms have one group, for one of two channels keeps little of
a colour. Qwen-Image's autoencoder stores kernels of three frames, of which a still image uses one, so its width is
halved.
"""

from __future__ import annotations

from typing import Any

LEARNED_TOKENS = 1024
"""The most entries of the vocabulary, bytes and merges, before the special tokens."""

Z_IMAGE: dict[str, dict[str, Any]] = {
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
"""The last of the text model's layers is dead, as in the real checkpoint: the pipeline reads what goes into it."""

QWEN_IMAGE: dict[str, dict[str, Any]] = {
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

DEMO = {"z-image": Z_IMAGE, "qwen-image": QWEN_IMAGE}
"""Family -> component -> config; what depends on the vocabulary is filled in with the tokenizer at hand."""
