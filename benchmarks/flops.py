"""What one forward of a transformer costs, and what the cards could do at most.

A multiply and an add are two operations. Counted are the matrix products that the transformers of diffusers 0.42 run
for one picture and one prompt, as ``torch.utils.flop_counter.FlopCounterMode`` counts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PEAK_TFLOPS = {
    "NVIDIA H200": 989.4,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.4,
    "NVIDIA GeForce RTX 4090": 165.2,
}
"""A card, as its driver calls it -> TFLOP/s of dense bfloat16 with float32 accumulation, at the boost clock. Sources:
the white papers "NVIDIA H100 Tensor Core GPU Architecture" for SXM5, whose processors an H200 has as well, and PCIe;
"NVIDIA Ada GPU Architecture" for the RTX 4090. Twice as much is claimed for sparse matrices, which these are not."""


def of_step(family: str, config: Mapping[str, Any], height: int, width: int, tokens: int) -> int:
    """The operations of one forward without guidance.

    Args:
        family: ``"z-image"`` or ``"qwen-image"``.
        config: of its transformer.
        height: of the picture, in pixels.
        width: as ``height``.
        tokens: rows of the prompt's embedding.
    """
    return {"z-image": _z_image, "qwen-image": _qwen_image}[family](config, (height // 16) * (width // 16), tokens)


def _z_image(config: Mapping[str, Any], image: int, text: int) -> int:
    dim = int(config["dim"])
    hidden, width = int(dim / 3 * 8), min(dim, 256)
    image, text = -(-image // 32) * 32, -(-text // 32) * 32
    layers, refiners, patch = int(config["n_layers"]), int(config["n_refiner_layers"]), 4 * int(config["in_channels"])

    def block(length: int) -> int:
        return 2 * length * (4 * dim**2 + 3 * dim * hidden) + 4 * length**2 * dim

    blocks = layers * block(image + text) + refiners * (block(image) + block(text))
    time = 2 * (256 * 1024 + 1024 * width) + 2 * width * dim * (4 * (layers + refiners) + 1)
    ends = 2 * image * patch * dim + 2 * (image + text) * dim * patch + 2 * text * int(config["cap_feat_dim"]) * dim
    return blocks + time + ends


def _qwen_image(config: Mapping[str, Any], image: int, text: int) -> int:
    dim = int(config["num_attention_heads"] * config["attention_head_dim"])
    length, layers = image + text, int(config["num_layers"])
    block = 2 * length * (4 * dim**2 + 2 * dim * 4 * dim) + 4 * length**2 * dim
    modulation = 2 * 2 * dim * 6 * dim
    time = 2 * (256 * dim + dim**2) + 2 * dim * 2 * dim
    ends = 2 * image * dim * int(config["in_channels"] + 4 * config["out_channels"])
    return layers * (block + modulation) + time + ends + 2 * text * int(config["joint_attention_dim"]) * dim
