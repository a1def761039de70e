"""Write a checkpoint whose transformer has the real size and random weights, made piece by piece on a device.

Its text encoder, VAE and tokenizer are the tiny ones of the tests: a bundle has to have some.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import families
from sparse_checkpoint import shapes_of, write_holes

from zimgkit.export.networks.registry import WEIGHT_FILES

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from zimgkit.engines.tensors.safetensors import TensorInfo

PIECE = 1 << 24
"""How many weights are made at a time."""


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

    common.reference().FAMILIES[family]().save_pretrained(folder)
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


def _pieces(info: TensorInfo, generator: torch.Generator) -> Iterator[NDArray[Any]]:
    """Normal numbers as bfloat16 bits. Products keep the size of what they multiply; norms multiply by about one."""
    import torch

    mean, deviation = 0.0, 0.02
    if "pad_token" in info.name:
        deviation = 1.0
    elif len(info.shape) > 1:
        deviation = math.prod(info.shape[1:]) ** -0.5
    elif info.name.endswith("weight"):
        mean = 1.0
    size = math.prod(info.shape)
    for start in range(0, size, PIECE):
        values = torch.randn(min(PIECE, size - start), generator=generator, device=generator.device)
        yield values.mul_(deviation).add_(mean).bfloat16().view(torch.int16).cpu().numpy()
