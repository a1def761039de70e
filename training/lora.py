"""Low-rank adapters: trained beside frozen linears, and written in the keys that DiffSynth writes.

A linear W becomes W + B A, A (rank, in) and B (out, rank), with no other factor, so a file needs no alpha ("LoRA",
Hu et al., 2021, https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zimgkit.engines.errors import UsageError
from zimgkit.engines.files import replacing
from zimgkit.export.checkpoints.checkpoint import Checkpoint
from zimgkit.training import families
from zimgkit.training.checkpoint import load_component
from zimgkit.training.dataset import Dataset
from zimgkit.training.diffusion import Denoiser, DenoiserTask
from zimgkit.training.families import TrainingFamily
from zimgkit.training.frozen_text import frozen_text_task
from zimgkit.training.latents import Latents


class LoraLinear(nn.Module):
    """A frozen linear and its adapter, which begins as zero."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        down = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        device = base.weight.device
        self.lora_A = nn.Parameter(down.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        delta = x.to(self.lora_A.dtype) @ self.lora_A.T @ self.lora_B.T
        out: Tensor = self.base(x)
        return out + delta.to(out.dtype)


def add_adapters(transformer: Any, family: TrainingFamily, targets: str, rank: int, seed: int) -> None:
    """Freeze a network and put an adapter beside each linear whose name has one of these ends, if it is of any use.

    Args:
        transformer: a network of diffusers.
        family: its family.
        targets: ends of names, separated by commas.
        rank: of the adapters.
        seed: of what they begin with.

    Raises:
        UsageError: the rank is not positive, or an end fits no linear.
    """
    if rank < 1:
        raise UsageError(f"--rank is {rank}", "it must be at least 1")
    transformer.requires_grad_(False)
    unused = family.unused_modules(transformer)
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    generator = torch.Generator().manual_seed(seed)
    for target in filter(None, (part.strip() for part in targets.split(","))):
        fitting = [name for name in linears if re.search(rf"(^|\.){re.escape(target)}$", name)]
        if not fitting:
            ends = sorted({re.split(r"\.\d+\.", name)[-1] for name in linears})
            raise UsageError(f"--targets: no linear is called {target}", f"there are {', '.join(ends)}")
        for name in fitting:
            parent, _, child = name.rpartition(".")
            if isinstance(transformer.get_submodule(name), nn.Linear) and not name.startswith(unused):
                setattr(transformer.get_submodule(parent), child, LoraLinear(linears[name], rank, generator))


def lora_task(
    checkpoint: Checkpoint,
    dataset: Dataset,
    latents: Latents,
    *,
    targets: str | None,
    rank: int,
    seed: int,
    precision: str,
    extras: Collection[str] = (),
    held: str | None = None,
    begin: str | None = None,
    gradient_checkpointing: bool = False,
) -> DenoiserTask:
    """The task of training adapters: the text model has read all captions before, and is not needed any more.

    Args:
        checkpoint: whose transformer is adapted.
        dataset: pictures and captions.
        latents: of the dataset.
        targets: ends of names, separated by commas; by default those of the family.
        rank: of the adapters.
        seed: of what they begin with.
        precision: the element type of the frozen weights.
        extras: columns of the dataset that the transformer takes beside.
        held: a LoRA to hold in the weights meanwhile, and to take off at use.
        begin: a LoRA to go on from, of which targets and rank are taken.
        gradient_checkpointing: compute activations twice rather than keep them, for models that leave little memory.

    Raises:
        CheckpointError: a component cannot be loaded.
        UsageError: see :func:`add_adapters`.
    """
    from zimgkit.training.methods.held import begin_with, hold_lora, read_adapters

    family = families.family(checkpoint.family)
    transformer = load_component(checkpoint, "transformer", getattr(torch, precision))
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if held:
        hold_lora(transformer, checkpoint, held)
    begun: dict[str, dict[str, Tensor]] = {}
    if begin:
        begun, rank = read_adapters(begin)
        targets = ",".join(begun)
    add_adapters(transformer, family, targets or family.lora_targets, rank, seed)
    begin_with(transformer, begun)
    return frozen_text_task("lora", checkpoint, dataset, latents, Denoiser(family, transformer), extras)


def write_lora(path: Path, weights: Mapping[str, Tensor], precision: str = "bfloat16") -> None:
    """Write adapters as ``<module>.lora_A.default.weight`` and ``<module>.lora_B.default.weight``.

    Args:
        path: a safetensors file; it is overwritten.
        weights: the trained parameters of a :class:`~zimgkit.training.diffusion.Denoiser`, by name.
        precision: the element type they are stored in.
    """
    from safetensors.torch import save_file

    stored = {
        f"{name.removeprefix('transformer.')}.default.weight": value.to(getattr(torch, precision)).contiguous().cpu()
        for name, value in weights.items()
    }
    with replacing(path) as part:
        save_file(stored, part, {"format": "pt"})
