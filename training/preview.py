"""Pictures of a model in training, drawn by the reference pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimgkit.export.checkpoints.checkpoint import Checkpoint
from zimgkit.training import families
from zimgkit.training.checkpoint import load_component
from zimgkit.training.dataset import Dataset
from zimgkit.training.vae import write_grid

PICTURES = 8
STEPS = 20
CFG_SCALE = 3.0
"""Of guidance, in DiffSynth's form."""

Encode = Callable[[Sequence[str]], list[Tensor]]
"""Prompts to what the transformer is conditioned on, (tokens, hidden) each."""


def drawer(checkpoint: Checkpoint, dataset: Dataset, transformer: Any, encode: Encode) -> Callable[[Path], None]:
    """Make a function that draws captions of a dataset with the weights that the networks have then.

    Args:
        checkpoint: of which autoencoder and scheduler are taken.
        dataset: whose captions are drawn, at the commonest size.
        transformer: of diffusers.
        encode: reads the captions, and those that stand for no prompt.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    family = families.family(checkpoint.family)
    pipeline: Any = family.reference_class("pipeline")(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(checkpoint.config("scheduler")),
        vae=load_component(checkpoint, "vae").eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    (height, width), rows = max(dataset.buckets().items(), key=lambda bucket: len(bucket[1]))
    chosen = [dataset.rows[int(rows[place])].prompt for place in torch.linspace(0, len(rows) - 1, PICTURES).long()]
    scale = family.host.guidance_scale(CFG_SCALE)

    def draw(path: Path) -> None:
        parameter = next(transformer.parameters())
        pipeline.vae.to(parameter.device)
        positive, negative = (
            [row.to(parameter) for row in encode(texts)] for texts in (chosen, family.no_prompts[:1] * PICTURES)
        )
        images = pipeline(
            height=height,
            width=width,
            num_inference_steps=STEPS,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="pt",
            **family.guided_call(positive, negative, scale),
        ).images
        write_grid(path, 2 * images.float() - 1, columns=PICTURES // 2)
        path.with_suffix(".txt").write_text("".join(f"{prompt}\n" for prompt in chosen), encoding="utf-8")

    return draw
