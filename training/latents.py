"""The latents of a dataset, encoded once and kept on disk in bfloat16, one file for each size of picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from zimgkit.export.checkpoints.checkpoint import Checkpoint
from zimgkit.runtime.diffusion.latents import Normalization, vae_normalization
from zimgkit.runtime.progress import Report, silent
from zimgkit.training.dataset import Dataset, Size, load_pictures
from zimgkit.training.vae import latent_channels, load_autoencoder

BATCH = 16
"""Pictures that are encoded at once."""


class OfBuckets(Protocol):
    """Latents by size of picture."""

    @property
    def buckets(self) -> Mapping[Size, Tensor]:
        """As :meth:`zimgkit.training.dataset.Dataset.buckets`."""

    def load(self, size: Size, rows: Tensor) -> Tensor:
        """The latents of rows of one size: (n, channels, height / 8, width / 8) float32."""


class Latents:
    """Cached latents, normalized as the transformer takes them. Use :func:`cache_latents`."""

    def __init__(self, files: Mapping[Size, Path], dataset: Dataset, channels: int) -> None:
        self.buckets = dataset.buckets()
        self._place = {int(row): place for rows in self.buckets.values() for place, row in enumerate(rows)}
        self._data = {
            size: np.memmap(file, np.int16, "r", shape=(len(self.buckets[size]), channels, size[0] // 8, size[1] // 8))
            for size, file in files.items()
        }

    def load(self, size: Size, rows: Tensor) -> Tensor:
        """The latents of rows of one size: (n, channels, height / 8, width / 8) float32."""
        places = [self._place[int(row)] for row in rows]
        return torch.from_numpy(self._data[size][places]).view(torch.bfloat16).float()


def cache_latents(checkpoint: Checkpoint, dataset: Dataset, folder: Path, report: Report = silent) -> Latents:
    """Encode a dataset's pictures, unless the folder has their latents already.

    Args:
        checkpoint: whose autoencoder encodes; means are taken, not samples.
        dataset: the pictures.
        folder: where the files go: ``latents-<height>x<width>.bin`` and ``latents.json``, which says of what they are.
        report: called with (stage, done, total).

    Raises:
        CheckpointError: the autoencoder cannot be loaded.
        DatasetError: a picture cannot be decoded.
    """
    channels = latent_channels(checkpoint.config("vae"))
    buckets = dataset.buckets()
    files = {size: folder / f"latents-{size[0]}x{size[1]}.bin" for size in buckets}
    index, identity = folder / "latents.json", _identity(checkpoint, dataset)
    if not (index.exists() and json.loads(index.read_text()) == identity and all(f.exists() for f in files.values())):
        folder.mkdir(parents=True, exist_ok=True)
        index.unlink(missing_ok=True)
        _encode(checkpoint, dataset, files, report)
        part = index.with_suffix(".part")
        part.write_text(json.dumps(identity))
        part.replace(index)
    return Latents(files, dataset, channels)


def normalization(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """Scale and shift of a checkpoint's latents, float32 (channels or 1, 1, 1) each: (raw - shift) * scale."""
    found: Normalization = vae_normalization(checkpoint.config("vae"))
    return torch.from_numpy(np.array(found.scale)), torch.from_numpy(np.array(found.shift))


def _encode(checkpoint: Checkpoint, dataset: Dataset, files: Mapping[Size, Path], report: Report) -> None:
    module = load_autoencoder(checkpoint).eval().requires_grad_(False)
    module = module.to("cuda" if torch.cuda.is_available() else "cpu")
    device = next(module.parameters()).device
    scale, shift = normalization(checkpoint)
    done = 0
    for size, rows in dataset.buckets().items():
        with files[size].open("wb") as file:
            for part in rows.split(BATCH):
                pixels = load_pictures([dataset.rows[int(row)].image for row in part])
                mean = module.encode(pixels.to(device))[0].cpu()
                file.write(((mean - shift) * scale).bfloat16().view(torch.int16).numpy().tobytes())
                done += len(part)
                report("latents", done, len(dataset.rows))


def _identity(checkpoint: Checkpoint, dataset: Dataset) -> dict[str, Any]:
    digest = hashlib.sha256()
    for info in checkpoint.tensors("vae").values():
        digest.update(f"{info.file.name} {info.file.stat().st_size} {info.file.stat().st_mtime_ns}".encode())
        break
    digest.update(json.dumps(checkpoint.config("vae"), sort_keys=True).encode())
    for row in dataset.rows:
        stat = row.image.stat()
        digest.update(f"{row.image} {row.size} {stat.st_size} {stat.st_mtime_ns}".encode())
    return {"of": digest.hexdigest()}
