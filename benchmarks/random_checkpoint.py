"""Write checkpoints of the real size with random weights: a transformer made on a device, or everything in a hurry.

Beside a transformer made on a device, text encoder and VAE are the tiny ones of the tests, the VAE for latents of the
real one: a bundle has to have some.

    python benchmarks/random_checkpoint.py FAMILY FOLDER         # all components, of one block of numbers, repeated
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import families
import numpy as np
import sparse_checkpoint
from sparse_checkpoint import shapes_of, write_holes

from zimgkit.export.networks.registry import FAMILIES, WEIGHT_FILES

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from zimgkit.engines.tensors.safetensors import TensorInfo

PIECE = 1 << 24
"""How many weights are made at a time."""
LATENTS = ("z_dim", "latents_mean", "latents_std", "latent_channels")
"""What of a VAE's config says which latents it takes."""
BLOCK = (1 << 22) - 3
"""How many numbers are repeated; prime, so that no two rows of a weight are the same."""


def transformer_config(family: str, *, tiny: bool = False, layers: int | None = None) -> dict[str, Any]:
    """The real config of a family's transformer, or a tiny one, with as many layers as wanted."""
    own = families.family(family)
    config = {**own.configs["transformer"], **(own.tiny if tiny else {})}
    return config | ({} if layers is None else {own.depth: layers})


def weight_bytes(config: dict[str, Any]) -> int:
    """How large a transformer's weights are in bfloat16."""
    return 2 * sum(math.prod(shape) for shape in shapes_of("transformer", config).values())


def write(family: str, folder: Path, config: dict[str, Any], *, device: str = "cpu", seed: int = 0) -> None:
    """Write a checkpoint in the diffusers layout, its transformer in bfloat16.

    Args:
        family: its name.
        folder: an empty or new folder.
        config: of the transformer.
        device: where the weights are made, such as ``"cuda"``; another one draws other numbers.
        seed: of the weights.
    """
    import torch

    from zimgkit.engines.tensors.safetensors import read_header

    vae = {name: value for name, value in families.family(family).configs["vae"].items() if name in LATENTS}
    common.reference().FAMILIES[family](vae=vae).save_pretrained(folder)
    transformer = folder / "transformer"
    shutil.rmtree(transformer)
    transformer.mkdir()
    (transformer / "config.json").write_text(json.dumps(config, indent=2))
    path = transformer / f"{WEIGHT_FILES['transformer']}.safetensors"
    write_holes(path, "bfloat16", shapes_of("transformer", config), families.family(family).shards["transformer"])
    generator = torch.Generator(device).manual_seed(seed)
    for file in sorted(transformer.glob("*.safetensors")):
        with file.open("r+b") as out:
            for info in read_header(file).values():
                out.seek(info.offset)
                for piece in _pieces(info, generator):
                    out.write(piece.data)


def fill(folder: Path, seed: int = 0) -> None:
    """Fill the files of :func:`sparse_checkpoint.write`, all in bfloat16, with one block of random numbers, repeated.

    That takes as long as the disk does. The block is scaled to what each tensor is.

    Args:
        folder: the checkpoint.
        seed: of the numbers.
    """
    from zimgkit.engines.tensors.dtypes import float32_to_bfloat16
    from zimgkit.engines.tensors.safetensors import read_header

    block = np.random.default_rng(seed).standard_normal(BLOCK, np.float32)
    for file in sorted(folder.rglob("*.safetensors")):
        with file.open("r+b") as out:
            for info in read_header(file).values():
                mean, deviation = distribution(info.name, info.shape)
                size = math.prod(info.shape)
                numbers = float32_to_bfloat16(mean + deviation * block[: min(BLOCK, size)])
                out.seek(info.offset)
                for start in range(0, size, BLOCK):
                    out.write(numbers[: size - start].data)


def distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation of a tensor's numbers: products keep the size of what they multiply; norms by about one."""
    if "pad_token" in name:
        return 0.0, 1.0
    if math.prod(shape[1:]) > 1:
        return 0.0, math.prod(shape[1:]) ** -0.5
    return (1.0 if name.endswith(("weight", "gamma")) else 0.0), 0.02


def _pieces(info: TensorInfo, generator: torch.Generator) -> Iterator[NDArray[Any]]:
    """Normal numbers as bfloat16 bits."""
    import torch

    mean, deviation = distribution(info.name, info.shape)
    size = math.prod(info.shape)
    for start in range(0, size, PIECE):
        values = torch.randn(min(PIECE, size - start), generator=generator, device=generator.device)
        yield values.mul_(deviation).add_(mean).bfloat16().view(torch.int16).cpu().numpy()


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--holes", action="store_true", help="leave the weights zero: they take no disk")
    options = parser.parse_args()
    print(sparse_checkpoint.write(options.family, options.folder))
    if not options.holes:
        fill(options.folder)


if __name__ == "__main__":
    main()
