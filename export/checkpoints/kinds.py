"""What a file is that is not taken, told by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable

KINDS = (
    (r".*\.(lora_(A|B|up|down)|hada_w1_a|lokr_w1)(\.|$)|lora_unet_", "a LoRA, which --lora takes"),
    (r".*\b(control_|controlnet_|input_hint_block)", "a ControlNet"),
    (r"double_blocks\.\d+\.txt_attn\..*|txt_in\.individual_token_refiner\.", "a HunyuanVideo transformer"),
    (r"double_blocks\.\d+\.img_attn\.|single_transformer_blocks\.", "a FLUX transformer"),
    (r"joint_blocks\.\d+\.", "a Stable Diffusion 3 transformer"),
    (r"input_blocks\.\d+\.|down_blocks\.\d+\.attentions\..*transformer_blocks\.", "a Stable Diffusion U-Net"),
    (r"blocks\.\d+\.cross_attn\.", "a Wan transformer"),
    (r"(encoder\.)?block\.\d+\.layer\.\d+\.SelfAttention", "a T5 text encoder"),
    (r"text_model\.encoder\.layers\.", "a CLIP text encoder"),
    (r"(encoder|decoder)\.(down_blocks|up_blocks|mid_block|down|up|mid|middle)\.", "a VAE"),
    (r"layers\.\d+\.self_attn\.q_proj\.", "a text encoder"),
    (r"transformer_blocks\.\d+\.attn\.to_q\.|layers\.\d+\.attention\.(to_q|qkv)\.", "a transformer"),
)
"""A pattern that some names begin with -> what has those; the first counts."""
PREFIX = r"(?:(?:model\.)?diffusion_model\.|model\.|transformer\.)?"


def kind_of(names: Iterable[str]) -> str:
    """What tensors of these names are, in words; empty where that is not known."""
    known = [*names]
    return next(
        (kind for pattern, kind in KINDS if any(re.match(PREFIX + f"(?:{pattern})", name) for name in known)), ""
    )
