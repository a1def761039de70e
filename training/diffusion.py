"""Flow matching: the network learns the velocity from latents to noise.

Latents at noise level sigma are (1 - sigma) latents + sigma noise, and the velocity is noise - latents ("Flow Matching
for Generative Modeling", Lipman et al., 2022, https://arxiv.org/abs/2210.02747; rectified flow). How a network is
asked for it is its family's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zimgkit.export.checkpoints.checkpoint import Checkpoint
from zimgkit.runtime.diffusion.schedule import Scheduler, calculate_mu, read_scheduler
from zimgkit.training import families, prompts
from zimgkit.training.checkpoint import load_component, load_tokenizer
from zimgkit.training.dataset import Dataset, Size, draw_batch
from zimgkit.training.families import TrainingFamily
from zimgkit.training.latents import Images, Latents, Targets
from zimgkit.training.preview import drawer

DROPOUT = 0.1
"""The share of captions that are left out, so that guidance has something to compare with."""
EDGES = ("embed", "img_in", "proj_out", "norm_out", "final_layer")
"""Parts of the names of matrices that are no hidden layer's: the first and the last ones."""
LENGTHS = 32
"""Texts of a batch lie between two multiples of so many tokens: there are networks that pad them to the next one."""


def draw_sigmas(count: int, image_tokens: int, scheduler: Scheduler, generator: torch.Generator) -> Tensor:
    """Noise levels to train on: even ones, shifted towards noise as the scheduler shifts them when it draws.

    Args:
        count: how many.
        image_tokens: of a picture; the dynamic shift depends on it.
        scheduler: the checkpoint's.
        generator: what they come from.

    Returns:
        (count,) float32, 0 to 1.
    """
    shift = math.exp(calculate_mu(image_tokens, scheduler)) if scheduler.use_dynamic_shifting else scheduler.shift
    even = torch.rand(count, generator=generator)
    return shift * even / (1 + (shift - 1) * even)


class Rows(Protocol):
    """A tensor for each of some rows: a list, or what reads them when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Tensor: ...


class Beside(Protocol):
    """What a dataset's rows give a network beside their latents and texts."""

    def kind(self, row: int) -> Hashable:
        """What rows of one batch have in common."""

    def load(self, rows: Tensor, dropped: Tensor) -> dict[str, Any]:
        """Arguments of the family's ``velocity`` for some rows; a text among them stands in the place of the rows' own.

        Args:
            rows: int64 (n,).
            dropped: bool (n,), which of them are to be drawn from no prompt.
        """


class Denoiser(nn.Module):
    """The transformer, with what is trained beside it; returns the loss of a batch."""

    def __init__(self, family: TrainingFamily, transformer: Any, text_encoder: Any = None, net: Any = None) -> None:
        """Put networks together.

        Args:
            family: how they are called.
            transformer: of diffusers.
            text_encoder: where it is trained along.
            net: a ControlNet.
        """
        super().__init__()
        self.family = family
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.net = net

    def forward(
        self, latents: Tensor, noise: Tensor, sigmas: Tensor, text: Tensor, mask: Tensor, **beside: Any
    ) -> Tensor:
        """The mean squared error of the velocity.

        Args:
            latents: (batch, channels, h, w).
            noise: as ``latents``.
            sigmas: (batch,).
            text: token ids (batch, tokens) where the text model is here; else its rows (batch, tokens, hidden).
            mask: (batch, tokens) bool.
            beside: what else the family's ``velocity`` takes.
        """
        if self.text_encoder is not None:
            text, mask = self.family.encode(self.text_encoder, text, mask)
        level = sigmas[:, None, None, None]
        noisy = (1 - level) * latents + level * noise
        dtype = next(self.transformer.parameters()).dtype
        if self.net is not None:
            beside["net"] = self.net
        out = self.family.velocity(self.transformer, noisy.to(dtype), sigmas.to(dtype), text.to(dtype), mask, **beside)
        return (out.float() - (noise - latents)).square().mean()


class DenoiserTask:
    """What the loop needs to train a transformer on cached latents."""

    def __init__(
        self,
        name: str,
        module: Denoiser,
        targets: Targets,
        texts: Rows,
        no_prompts: Rows,
        scheduler: Mapping[str, Any],
        beside: Sequence[Beside] = (),
    ) -> None:
        """Put together what a batch is drawn from.

        Args:
            name: of the stage.
            module: the network.
            targets: what it is to draw.
            texts: of each row of the dataset: token ids, or the text model's rows.
            no_prompts: the same of what stands for no prompt.
            scheduler: ``scheduler_config.json``.
            beside: what else the network is given.
        """
        self.name, self.module, self.targets, self.beside = name, module, targets, beside
        self.texts, self.no_prompts, self.scheduler = texts, no_prompts, read_scheduler(scheduler)
        self.groups = _groups(targets.sizes, texts, beside)
        self.hidden: frozenset[str] = frozenset()
        self.draw: Callable[[Path], None] = lambda path: None
        """Draws a preview into a file; set by who has the rest of the pipeline."""

    def batch(self, generator: torch.Generator, batch_size: int) -> dict[str, Tensor]:
        """Latents, noise, noise levels and texts, some of which are left out."""
        ((height, width), *_), rows = draw_batch(self.groups, batch_size, generator)
        latents = self.targets.of_rows(rows)
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
            **{name: value for one in self.beside for name, value in one.load(rows, dropped).items()},
        }

    def preview(self, path: Path) -> None:
        """A few of the dataset's captions, drawn."""
        self.draw(path)


def _groups(sizes: Sequence[Size], texts: Rows, beside: Sequence[Beside]) -> dict[tuple[Any, ...], Tensor]:
    """(size, length class, ...) -> rows of pictures of one size, whose texts are about as long, and so on."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, size in enumerate(sizes):
        length = -(-len(texts[index]) // LENGTHS)
        groups.setdefault((size, length, *(one.kind(index) for one in beside)), []).append(index)
    return {key: torch.tensor(groups[key]) for key in sorted(groups)}


def hidden_matrices(module: nn.Module) -> frozenset[str]:
    """The names of the matrices of hidden layers that are trained: those that Muon is for."""
    return frozenset(
        name
        for name, parameter in module.named_parameters()
        if parameter.ndim == 2 and parameter.requires_grad and not any(edge in name for edge in EDGES)
    )


def denoiser_task(checkpoint: Checkpoint, dataset: Dataset, latents: Latents) -> DenoiserTask:
    """The task of training a checkpoint's transformer and text model together, both in float32.

    Raises:
        CheckpointError: a component cannot be loaded.
    """
    family, tokenizer = families.family(checkpoint.family), load_tokenizer(checkpoint)
    text_encoder = load_component(checkpoint, "text_encoder")
    family.freeze_unused_text(text_encoder)
    transformer = load_component(checkpoint, "transformer")
    for name in family.unused_modules(transformer):
        transformer.get_submodule(name).requires_grad_(False)
    task = DenoiserTask(
        "diffusion",
        Denoiser(family, transformer, text_encoder),
        Images(dataset, latents),
        prompts.tokenize([row.prompt for row in dataset.rows], tokenizer, family),
        prompts.tokenize(family.no_prompts, tokenizer, family),
        checkpoint.config("scheduler"),
    )
    task.hidden = hidden_matrices(task.module)
    task.draw = drawer(
        checkpoint,
        dataset,
        transformer,
        lambda texts: prompts.encode_all(text_encoder, prompts.tokenize(texts, tokenizer, family), family),
    )
    return task
