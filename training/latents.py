"""The latents of a dataset, encoded once and kept on disk in bfloat16, one file for each size of picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from zimgkit.export.checkpoints.checkpoint import Checkpoint
from zimgkit.runtime.diffusion.latents import Normalization, vae_normalization
from zimgkit.runtime.progress import Report, silent
from zimgkit.training.dataset import Dataset, Size
from zimgkit.training.vae import latent_channels, load_autoencoder

BATCH = 16
"""Pictures that are encoded at once."""


class Targets(Protocol):
    """The latents that a network is to draw, by the rows of a dataset."""

    @property
    def sizes(self) -> Sequence[Size]:
        """Height and width of each row's picture, in pixels."""

    def of_rows(self, rows: Tensor) -> Tensor:
        """The latents of rows of one size: (n, channels, height / 8, width / 8) float32."""


class Latents:
    """Cached latents, normalized as the transformer takes them. Use :func:`cache_latents`."""

    def __init__(self, folder: Path, sizes: Mapping[Path, Size], channels: int) -> None:
        self._place = {picture: place for one in by_size(sizes).values() for place, picture in enumerate(one)}
        self._sizes = sizes
        self._data = {
            size: np.memmap(_file(folder, size), np.int16, "r", shape=(len(one), channels, size[0] // 8, size[1] // 8))
            for size, one in by_size(sizes).items()
        }

    def load(self, pictures: Sequence[Path]) -> Tensor:
        """The latents of pictures of one size: (n, channels, height / 8, width / 8) float32."""
        places = [self._place[picture] for picture in pictures]
        return torch.from_numpy(self._data[self._sizes[pictures[0]]][places]).view(torch.bfloat16).float()


class Images:
    """Those of a dataset's images, see :class:`Targets`."""

    def __init__(self, dataset: Dataset, latents: Latents) -> None:
        self.sizes = [row.size for row in dataset.rows]
        self._dataset, self._latents = dataset, latents

    def of_rows(self, rows: Tensor) -> Tensor:
        """The latents of rows of one size: (n, channels, height / 8, width / 8) float32."""
        return self._latents.load([self._dataset.rows[int(row)].image for row in rows])


def by_size(sizes: Mapping[Path, Size]) -> dict[Size, list[Path]]:
    """Size -> the pictures that have it, sizes in rising order."""
    found: dict[Size, list[Path]] = {}
    for picture, size in sizes.items():
        found.setdefault(size, []).append(picture)
    return {size: found[size] for size in sorted(found)}


def _file(folder: Path, size: Size) -> Path:
    return folder / f"latents-{size[0]}x{size[1]}.bin"


def cache_latents(
    checkpoint: Checkpoint,
    dataset: Dataset,
    folder: Path,
    report: Report = silent,
    *,
    columns: Collection[str] = (),
) -> Latents:
    """Encode a dataset's pictures, unless the folder has their latents already.

    Args:
        checkpoint: whose autoencoder encodes; means are taken, not samples.
        dataset: the pictures.
        folder: where the files go: ``latents-<height>x<width>.bin`` and ``latents.json``, which says of what they are.
        report: called with (stage, done, total).
        columns: whose pictures are encoded beside the images.

    Raises:
        CheckpointError: the autoencoder cannot be loaded.
        DatasetError: a picture cannot be decoded.
    """
    channels = latent_channels(checkpoint.config("vae"))
    pictures = [picture for row in dataset.rows for name in columns for picture in row.pictures.get(name, ())]
    sizes = {picture: dataset.sizes[picture] for picture in (*(row.image for row in dataset.rows), *pictures)}
    index, identity = folder / "latents.json", _identity(checkpoint, sizes)
    files = [_file(folder, size) for size in by_size(sizes)]
    if not (index.exists() and json.loads(index.read_text()) == identity and all(f.exists() for f in files)):
        folder.mkdir(parents=True, exist_ok=True)
        index.unlink(missing_ok=True)
        _encode(checkpoint, dataset, sizes, folder, report)
        part = index.with_suffix(".part")
        part.write_text(json.dumps(identity))
        part.replace(index)
    return Latents(folder, sizes, channels)


def normalization(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """Scale and shift of a checkpoint's latents, float32 (channels or 1, 1, 1) each: (raw - shift) * scale."""
    found: Normalization = vae_normalization(checkpoint.config("vae"))
    return torch.from_numpy(np.array(found.scale)), torch.from_numpy(np.array(found.shift))


def _encode(checkpoint: Checkpoint, dataset: Dataset, sizes: Mapping[Path, Size], folder: Path, report: Report) -> None:
    module = load_autoencoder(checkpoint).eval().requires_grad_(False)
    module = module.to("cuda" if torch.cuda.is_available() else "cpu")
    device = next(module.parameters()).device
    scale, shift = normalization(checkpoint)
    done = 0
    for size, pictures in by_size(sizes).items():
        with _file(folder, size).open("wb") as file:
            for start in range(0, len(pictures), BATCH):
                part = pictures[start : start + BATCH]
                mean = module.encode(dataset.load(part).to(device))[0].cpu()
                file.write(((mean - shift) * scale).bfloat16().view(torch.int16).numpy().tobytes())
                done += len(part)
                report("latents", done, len(sizes))


def _identity(checkpoint: Checkpoint, sizes: Mapping[Path, Size]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for info in checkpoint.tensors("vae").values():
        digest.update(f"{info.file.name} {info.file.stat().st_size} {info.file.stat().st_mtime_ns}".encode())
        break
    digest.update(json.dumps(checkpoint.config("vae"), sort_keys=True).encode())
    for picture, size in sizes.items():
        stat = picture.stat()
        digest.update(f"{picture} {size} {stat.st_size} {stat.st_mtime_ns}".encode())
    return {"of": digest.hexdigest()}
