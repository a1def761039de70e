"""ControlNets: trained beside a frozen transformer, and written in the keys of the published files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimgkit.engines.errors import CheckpointError, UsageError
from zimgkit.engines.files import replacing
from zimgkit.export.checkpoints.checkpoint import Checkpoint
from zimgkit.training import families
from zimgkit.training.beside import CONTROL
from zimgkit.training.checkpoint import load_component
from zimgkit.training.dataset import Dataset
from zimgkit.training.diffusion import Denoiser, DenoiserTask, hidden_matrices
from zimgkit.training.frozen_text import frozen_text_task
from zimgkit.training.latents import Latents
from zimgkit.training.vae import latent_channels


def control_task(
    checkpoint: Checkpoint,
    dataset: Dataset,
    latents: Latents,
    *,
    kind: str | None,
    begin: Path | None,
    seed: int,
    precision: str,
    extras: Collection[str],
    gradient_checkpointing: bool = False,
) -> DenoiserTask:
    """The task of training a ControlNet.

    Args:
        checkpoint: whose transformer is controlled.
        dataset: pictures, captions, and the pictures that control.
        latents: of both.
        kind: the architecture, by default the family's usual one.
        begin: a file with the net's weights.
        seed: of what it begins with.
        precision: the element type of the frozen weights.
        extras: columns of the dataset, one of pictures that control among them.
        gradient_checkpointing: compute activations twice rather than keep them.

    Raises:
        CheckpointError: a component, or the file, cannot be loaded.
        UsageError: no column controls, or the family has no such nets.
    """
    family = families.family(checkpoint.family)
    if not {*CONTROL} & {*extras}:
        raise UsageError("--extra-inputs names no picture that controls", f"name {CONTROL[0]}")
    kind = kind or next(iter(family.nets), "none")
    if kind not in family.nets:
        raise UsageError(f"{family.name} has no ControlNets of the kind {kind}", f"there are {', '.join(family.nets)}")
    transformer = load_component(checkpoint, "transformer", getattr(torch, precision)).requires_grad_(False)
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: Any = family.nets[kind](transformer, latent_channels(checkpoint.config("vae")))
    if begin is not None:
        _load(net, begin)
    net.attach(transformer)
    task = frozen_text_task("control", checkpoint, dataset, latents, Denoiser(family, transformer, net=net), extras)
    task.hidden = hidden_matrices(task.module)
    return task


def write_net(path: Path, weights: Mapping[str, Tensor], precision: str = "bfloat16") -> None:
    """Write a ControlNet in the keys of published ones.

    Args:
        path: a safetensors file; it is overwritten.
        weights: the trained parameters of a :class:`~zimgkit.training.diffusion.Denoiser`, by name.
        precision: the element type they are stored in.
    """
    from safetensors.torch import save_file

    stored = {name: value.to(getattr(torch, precision)).contiguous().cpu() for name, value in _published(weights)}
    with replacing(path) as part:
        save_file(stored, part, {"format": "pt"})


def _published(weights: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """A net of diffusers is one deeper within what attaches it."""
    return [(name.removeprefix("net.").removeprefix("net."), value) for name, value in weights.items()]


def _load(net: Any, file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({error})", "name a ControlNet of safetensors") from None
    own = dict(_published(dict(net.named_parameters())))
    if {name: value.shape for name, value in found.items()} != {name: value.shape for name, value in own.items()}:
        raise CheckpointError(f"{file} does not hold the tensors of this net", "name one of this kind and checkpoint")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(found[name])
