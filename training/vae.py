"""Training of autoencoders, in the form zimgkit exports: two-dimensional, whatever the checkpoint stores.

The loss is the mean squared difference of pixels, of their hue more than of their lightness; the mean absolute
difference and that of gradients, which count when the squares have become small and make edges sharp; and a little of
the divergence from a normal distribution, which keeps latents smooth (Kingma and Welling, 2013,
https://arxiv.org/abs/1312.6114).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zimgkit.export.checkpoints.checkpoint import Checkpoint
from zimgkit.training import families
from zimgkit.training.checkpoint import load_component
from zimgkit.training.dataset import Dataset, draw_batch
from zimgkit.training.families import TrainingFamily

SQUARES, HUE, SHARPNESS, DIVERGENCE = 4.0, 4.0, 0.25, 1e-4
"""Weights of squares, of hue among them, of absolute differences, and of the divergence, a mean over latents."""
EDGES = ("conv_in.weight", "conv_out.weight", "quant_conv.weight")
"""Ends of the names of kernels that are no hidden layer's."""
MEASURED = 512
"""Of how many pictures the mean and standard deviation of the latents are taken."""


class Autoencoder(nn.Module):
    """Encoder and decoder of one still image; returns the loss of a batch."""

    def __init__(self, family: TrainingFamily, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder, self.decoder = family.autoencoder(config)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, 3, height, width) -> mean and logarithm of the variance, each (batch, channels, h, w)."""
        mean, log_variance = self.encoder(pixels).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Pixels (batch, 3, height, width), noise (batch, channels, height / 8, width / 8) -> the loss."""
        mean, log_variance = self.encode(pixels)
        difference = self.decoder(mean + noise * torch.exp(log_variance / 2)) - pixels
        lightness = difference.mean(dim=1, keepdim=True)
        squares = lightness.square().mean() + HUE * (difference - lightness).square().mean()
        edges = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        loss: Tensor = SQUARES * squares + SHARPNESS * (difference.abs().mean() + edges) + DIVERGENCE * divergence
        return loss


class AutoencoderTask:
    """What the loop needs to train an autoencoder, or its decoder alone: then latents stay what they are."""

    name = "vae"

    def __init__(self, checkpoint: Checkpoint, dataset: Dataset, *, with_encoder: bool = True) -> None:
        self.dataset = dataset
        self.buckets = dataset.buckets()
        self.crops = families.family(checkpoint.family).crops
        self.channels = latent_channels(checkpoint.config("vae"))
        self.module = load_autoencoder(checkpoint)
        self.module.encoder.requires_grad_(with_encoder)
        self.hidden = frozenset(
            name
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad and parameter.ndim >= 2 and not name.endswith(EDGES)
        )

    def batch(self, generator: torch.Generator, batch_size: int) -> dict[str, Tensor]:
        """Pieces of pictures, and the noise of their latents."""
        (height, width), rows = draw_batch(self.buckets, batch_size, generator)
        pixels = self.dataset.load([self.dataset.rows[int(row)].image for row in rows])
        side = list(self.crops)[int(torch.multinomial(torch.tensor([*self.crops.values()]), 1, generator=generator))]
        tall, wide = min(height, side), min(width, side)
        tops = torch.randint(height - tall + 1, (batch_size,), generator=generator).tolist()
        lefts = torch.randint(width - wide + 1, (batch_size,), generator=generator).tolist()
        pieces = [
            one[:, top : top + tall, left : left + wide] for one, top, left in zip(pixels, tops, lefts, strict=True)
        ]
        noise = torch.randn((batch_size, self.channels, tall // 8, wide // 8), generator=generator)
        return {"pixels": torch.stack(pieces), "noise": noise}

    def preview(self, path: Path) -> None:
        """Eight pictures, and what becomes of them, below."""
        rows = next(iter(self.buckets.values()))
        pixels = self.dataset.load([self.dataset.rows[int(row)].image for row in rows[:8]])
        pixels = pixels.to(next(self.module.parameters()).device)
        decoded = self.module.decoder(self.module.encode(pixels)[0])
        write_grid(path, torch.cat([pixels, decoded]), columns=len(pixels))


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latents, by any family's ``vae/config.json``."""
    return int(config["latent_channels"] if "latent_channels" in config else config["z_dim"])


def load_autoencoder(checkpoint: Checkpoint) -> Autoencoder:
    """A checkpoint's autoencoder in float32, as the networks that a still image needs."""
    module = Autoencoder(families.family(checkpoint.family), checkpoint.config("vae"))
    stored = load_component(checkpoint, "vae").state_dict()
    for half in (module.encoder, module.decoder):
        wanted = half.state_dict()
        half.load_state_dict({name: _still(stored[name], value) for name, value in wanted.items()})
    return module


def _still(stored: Tensor, like: Tensor) -> Tensor:
    """The part of a stored tensor that acts on a still image: the last slice in time, where there is time."""
    if stored.ndim == like.ndim:
        return stored
    return stored[:, :, -1] if stored.ndim == 5 else stored[..., 0]


def stored_autoencoder(checkpoint: Checkpoint, module: Autoencoder, statistics: Mapping[str, Any]) -> Any:
    """The reference's model with the trained weights; the rest of a video autoencoder is zeros.

    Args:
        checkpoint: whose autoencoder was trained.
        module: the trained networks.
        statistics: what :func:`measure` gave; goes to the config.
    """
    model = load_component(checkpoint, "vae")
    trained = {**module.encoder.state_dict(), **module.decoder.state_dict()}
    stored = {}
    for name, old in model.state_dict().items():
        value = torch.zeros_like(old)
        if name in trained:
            _still(value, trained[name]).copy_(trained[name])
        stored[name] = value
    model.load_state_dict(stored)
    model.register_to_config(**statistics)
    return model


def measure(module: Autoencoder, dataset: Dataset, family: TrainingFamily) -> dict[str, Any]:
    """Mean and standard deviation of latents, as the transformer is trained on, in the words of the family's config."""
    sums: list[Tensor] = []
    device = next(module.parameters()).device
    with torch.no_grad():
        for rows in dataset.buckets().values():
            count = max(1, MEASURED * len(rows) // len(dataset.rows))
            evenly = torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()
            for part in rows[evenly].split(32):
                pixels = dataset.load([dataset.rows[int(row)].image for row in part]).to(device)
                mean, _ = module.encode(pixels)
                moments = torch.stack([torch.ones_like(mean), mean, mean.square()])
                sums.append(moments.double().sum(dim=(1, 3, 4)).cpu())
    count, first, second = torch.stack(sums).sum(dim=0)
    return family.latents_statistics(count, first, second)


def write_grid(path: Path, pixels: Tensor, columns: int) -> None:
    """Pictures of one size, (n, 3, height, width), -1 to 1, as one PNG, row by row."""
    from PIL import Image

    rows = [torch.cat(list(part), dim=2) for part in pixels.split(columns)]
    grid = torch.cat(rows, dim=1).clamp(-1, 1).permute(1, 2, 0)
    Image.fromarray(((grid + 1) * 127.5).round().byte().cpu().numpy()).save(path)
