"""Flow matching as both families use it: the network learns the velocity from latents to noise.

Latents at noise level sigma are (1 - sigma) latents + sigma noise, and the velocity is noise - latents ("Flow Matching
for Generative Modeling", Lipman et al., 2022, https://arxiv.org/abs/2210.02747; rectified flow). Qwen-Image is given
sigma and predicts the velocity; Z-Image is given 1 - sigma and predicts the negated velocity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zimgkit.export.checkpoints.checkpoint import Checkpoint
from zimgkit.runtime.diffusion.schedule import calculate_mu
from zimgkit.training import prompts
from zimgkit.training.checkpoint import load_component, load_tokenizer
from zimgkit.training.dataset import Dataset, Size, draw_batch
from zimgkit.training.latents import Latents
from zimgkit.training.preview import drawer

DROPOUT = 0.1
"""The share of captions that are left out, so that guidance has something to compare with."""
EDGES = ("embed", "img_in", "proj_out", "norm_out", "final_layer")
"""Parts of the names of matrices that are no hidden layer's: the first and the last ones."""
LENGTHS = 32
"""Texts of a batch lie between two multiples of so many tokens: Z-Image pads them to the next one."""


def velocity(
    transformer: Any, latents: Tensor, sigmas: Tensor, prompt_embeds: Tensor, mask: Tensor, family: str
) -> Tensor:
    """Ask a transformer of diffusers for the velocity.

    Args:
        transformer: ``ZImageTransformer2DModel`` or ``QwenImageTransformer2DModel``.
        latents: (batch, channels, h, w).
        sigmas: (batch,).
        prompt_embeds: (batch, tokens, hidden).
        mask: (batch, tokens) bool, True from the left as far as each prompt goes.
        family: ``"z-image"`` or ``"qwen-image"``.

    Returns:
        (batch, channels, h, w).
    """
    if family == "z-image":
        # Pads up to 32 tokens are the network's own; those of the batch must not be there at all.
        captions = [rows[: int(keep.sum())] for rows, keep in zip(prompt_embeds, mask, strict=True)]
        pictures = list(latents.unsqueeze(2))
        return -torch.stack(transformer(pictures, 1 - sigmas, captions, return_dict=False)[0]).squeeze(2)
    batch, channels, height, width = latents.shape
    rows, columns = height // 2, width // 2
    tokens = latents.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    out: Tensor = transformer(
        hidden_states=tokens,
        timestep=sigmas,
        encoder_hidden_states=prompt_embeds,
        encoder_hidden_states_mask=None if bool(mask.all()) else mask,
        img_shapes=[[(1, rows, columns)]] * batch,
        return_dict=False,
    )[0]
    out = out.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return out.reshape(batch, channels, height, width)


def draw_sigmas(count: int, image_tokens: int, scheduler: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    """Noise levels to train on: even ones, shifted towards noise as the scheduler shifts them when it draws.

    Args:
        count: how many.
        image_tokens: of a picture; the dynamic shift depends on it.
        scheduler: ``scheduler_config.json``.
        generator: what they come from.

    Returns:
        (count,) float32, 0 to 1.
    """
    if scheduler.get("use_dynamic_shifting"):
        shift = math.exp(calculate_mu(image_tokens, scheduler))
    else:
        shift = float(scheduler.get("shift", 1.0))
    even = torch.rand(count, generator=generator)
    return shift * even / (1 + (shift - 1) * even)


def dead_ends(transformer: Any, family: str) -> tuple[str, ...]:
    """Modules whose results nothing reads: the text stream of Qwen-Image ends in the last block."""
    if family == "z-image":
        return ()
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}"
    return tuple(f"{last}.{name}" for name in ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp"))


class Denoiser(nn.Module):
    """The transformer, and the text model where it is trained along; returns the loss of a batch."""

    def __init__(self, family: str, transformer: Any, text_encoder: Any = None) -> None:
        super().__init__()
        self.family = family
        self.transformer = transformer
        self.text_encoder = text_encoder

    def forward(self, latents: Tensor, noise: Tensor, sigmas: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The mean squared error of the velocity.

        Args:
            latents: (batch, channels, h, w).
            noise: as ``latents``.
            sigmas: (batch,).
            text: token ids (batch, tokens) where the text model is here; else its rows (batch, tokens, hidden).
            mask: (batch, tokens) bool.
        """
        if self.text_encoder is not None:
            text, mask = prompts.encode(self.text_encoder, text, mask, self.family)
        level = sigmas[:, None, None, None]
        noisy = (1 - level) * latents + level * noise
        dtype = next(self.transformer.parameters()).dtype
        out = velocity(self.transformer, noisy.to(dtype), sigmas.to(dtype), text.to(dtype), mask, self.family)
        return (out.float() - (noise - latents)).square().mean()


class DenoiserTask:
    """What the loop needs to train a transformer on cached latents."""

    def __init__(
        self,
        name: str,
        module: Denoiser,
        latents: Latents,
        texts: Sequence[Tensor],
        no_prompts: Sequence[Tensor],
        scheduler: Mapping[str, Any],
    ) -> None:
        """Put together what a batch is drawn from.

        Args:
            name: of the stage.
            module: the network.
            latents: of the dataset.
            texts: of each row of the dataset: token ids, or the text model's rows.
            no_prompts: the same of what stands for no prompt.
            scheduler: ``scheduler_config.json``.
        """
        self.name, self.module, self.latents = name, module, latents
        self.texts, self.no_prompts, self.scheduler = texts, no_prompts, scheduler
        self.groups = _groups(latents.buckets, texts)
        self.hidden: frozenset[str] = frozenset()
        self.draw: Callable[[Path], None] = lambda path: None
        """Draws a preview into a file; set by who has the rest of the pipeline."""

    def batch(self, generator: torch.Generator, batch_size: int) -> dict[str, Tensor]:
        """Latents, noise, noise levels and texts, some of which are left out."""
        ((height, width), _), rows = draw_batch(self.groups, batch_size, generator)
        latents = self.latents.load((height, width), rows)
        dropped = torch.rand(batch_size, generator=generator) < DROPOUT
        instead = torch.randint(len(self.no_prompts), (batch_size,), generator=generator)
        chosen = [
            self.no_prompts[int(other)] if drop else self.texts[int(row)]
            for row, drop, other in zip(rows, dropped, instead, strict=True)
        ]
        text, mask = prompts.pad(chosen)
        return {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "sigmas": draw_sigmas(batch_size, (height // 16) * (width // 16), self.scheduler, generator),
            "text": text,
            "mask": mask,
        }

    def preview(self, path: Path) -> None:
        """A few of the dataset's captions, drawn."""
        self.draw(path)


def _groups(buckets: Mapping[Size, Tensor], texts: Sequence[Tensor]) -> dict[tuple[Size, int], Tensor]:
    """(size, length class) -> rows of pictures of one size whose texts are about as long."""
    groups = {}
    for size, rows in buckets.items():
        lengths = torch.tensor([-(-len(texts[int(row)]) // LENGTHS) for row in rows])
        for length in lengths.unique().tolist():
            groups[size, int(length)] = rows[lengths == length]
    return groups


def denoiser_task(checkpoint: Checkpoint, dataset: Dataset, latents: Latents) -> DenoiserTask:
    """The task of training a checkpoint's transformer and text model together, both in float32.

    Raises:
        CheckpointError: a component cannot be loaded.
    """
    family, tokenizer = checkpoint.family, load_tokenizer(checkpoint)
    text_encoder = load_component(checkpoint, "text_encoder")
    if family == "z-image":
        # The pipeline reads what goes into the last layer.
        text_encoder.layers[-1].requires_grad_(False)
        text_encoder.norm.requires_grad_(False)
    else:
        text_encoder.requires_grad_(False)
        text_encoder.model.language_model.requires_grad_(True)
    transformer = load_component(checkpoint, "transformer")
    for name in dead_ends(transformer, family):
        transformer.get_submodule(name).requires_grad_(False)
    task = DenoiserTask(
        "diffusion",
        Denoiser(family, transformer, text_encoder),
        latents,
        prompts.tokenize([row.prompt for row in dataset.rows], tokenizer, family),
        prompts.tokenize(prompts.NO_PROMPT[family], tokenizer, family),
        checkpoint.config("scheduler"),
    )
    task.hidden = frozenset(
        name
        for name, parameter in task.module.named_parameters()
        if parameter.ndim == 2 and parameter.requires_grad and not any(edge in name for edge in EDGES)
    )
    task.draw = drawer(
        checkpoint,
        dataset,
        transformer,
        lambda texts: prompts.encode_all(text_encoder, prompts.tokenize(texts, tokenizer, family), family),
    )
    return task
