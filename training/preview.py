"""Pictures of a model in training, drawn by the reference pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zimg.export.checkpoint import Checkpoint
from zimg.training.checkpoint import load_component, load_tokenizer
from zimg.training.dataset import Dataset
from zimg.training.vae import write_grid

PICTURES = 8
STEPS = 20
SCALE = 4.0
"""Of guidance, as each family's pipeline counts it."""


def drawer(checkpoint: Checkpoint, dataset: Dataset, transformer: Any, text_encoder: Any) -> Callable[[Path], None]:
    """Make a function that draws captions of a dataset with the weights that the networks have then.

    Args:
        checkpoint: of which tokenizer, autoencoder and scheduler are taken.
        dataset: whose captions are drawn, at the commonest size.
        transformer: of diffusers.
        text_encoder: of transformers.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, ZImagePipeline

    kind = ZImagePipeline if checkpoint.family == "z-image" else QwenImagePipeline
    pipeline: Any = kind(
        FlowMatchEulerDiscreteScheduler.from_config(checkpoint.config("scheduler")),
        load_component(checkpoint, "vae").eval(),
        text_encoder,
        load_tokenizer(checkpoint),
        transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    (height, width), rows = max(dataset.buckets().items(), key=lambda bucket: len(bucket[1]))
    chosen = [dataset.rows[int(rows[place])].prompt for place in torch.linspace(0, len(rows) - 1, PICTURES).long()]
    guided: dict[str, Any] = {"guidance_scale": SCALE}
    if checkpoint.family == "qwen-image":
        guided = {"true_cfg_scale": SCALE, "negative_prompt": [" "] * len(chosen)}

    def draw(path: Path) -> None:
        device = next(transformer.parameters()).device
        pipeline.vae.to(device)
        images = pipeline(
            list(chosen),
            height=height,
            width=width,
            num_inference_steps=STEPS,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="pt",
            **guided,
        ).images
        write_grid(path, 2 * images.float() - 1, columns=PICTURES // 2)
        path.with_suffix(".txt").write_text("".join(f"{prompt}\n" for prompt in chosen), encoding="utf-8")

    return draw
