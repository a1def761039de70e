"""What one forward of a transformer costs, and what the cards could do at most.

A multiply and an add are two operations. Counted are the matrix products that the transformers of diffusers 0.42 run
for one picture and one prompt, as ``torch.utils.flop_counter.FlopCounterMode`` counts them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import families

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
        family: its name.
        config: of its transformer.
        height: of the picture, in pixels.
        width: as ``height``.
        tokens: rows of the prompt's embedding.
    """
    return families.family(family).products(config, (height // 16) * (width // 16), tokens)


def of_control(family: str, config: Mapping[str, Any], height: int, width: int, tokens: int) -> tuple[int, int]:
    """The operations that a ControlNet adds to that, and those among them that read its picture alone.

    Args:
        family: its name.
        config: of its transformer.
        height: of the picture, in pixels.
        width: as ``height``.
        tokens: rows of the prompt's embedding.
    """
    return families.family(family).control.products(config, (height // 16) * (width // 16), tokens)
