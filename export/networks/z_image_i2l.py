"""Z-Image-i2L: what describes pictures to the matrices of a LoRA, in one forward and without denoising.

Source: ``ZImageImage2LoRAModel`` of DiffSynth-Studio 2.1.12. Each matrix is made by two linears without biases, the
first of which leaves so few numbers that a gigabyte of weights makes the matrices of all blocks.

A network's ``forward`` only calls its children; each kind of child is traced once, see ``zimgkit.export.graphs.trace``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.parts import Input, Part, Shapes

SOURCE = "i2l"
GROUPS = ("layers", "context_refiner", "noise_refiner")
MODULES = (
    ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
    ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)
"""What is adapted in each block: the generator has all blocks' first tuple, then all blocks' second."""
FIRST = "layers_lora.blocks.0.layers.0.proj_a"


class Target(NamedTuple):
    """A module of the transformer, and where the generator of its matrices stands."""

    name: str
    group: str
    block: int
    layer: int
    shape: tuple[int, ...]
    """Of its weight: outputs, inputs."""


@dataclass(frozen=True)
class Config:
    """What makes the network."""

    embedding: int
    """How many numbers describe a picture."""
    compressed: int
    rank: int
    targets: tuple[Target, ...]
    """In the order of the generator's parameters."""


def read_config(shapes: Shapes, transformer: Shapes) -> Config:
    """Read what a generator is.

    Args:
        shapes: its tensors, as its file has them.
        transformer: those of the transformer that its LoRAs are for.

    Raises:
        CheckpointError: it is no generator, or one for a transformer of other widths.
    """
    heads = [shapes.get(f"{FIRST}.proj_{end}.weight", ()) for end in ("in", "out")]
    if any(len(shape) != 2 for shape in heads):
        raise CheckpointError(
            f"is no generator of LoRAs: it has no {FIRST}.proj_in.weight", "name the file of an i2L release"
        )
    (compressed, embedding), (rows, _) = heads
    targets = tuple(_targets(transformer))
    rank, left = divmod(rows, targets[0].shape[1])
    if left or not rank:
        raise CheckpointError(
            f"makes {rows} numbers for {targets[0].name}, which has {targets[0].shape[1]} inputs",
            "it is the generator of another model: name the checkpoint that it is for",
        )
    return Config(embedding, compressed, rank, targets)


def _targets(transformer: Shapes) -> Iterator[Target]:
    """The modules of a transformer that are adapted, in the generator's order."""
    for group in GROUPS:
        depth = sum(name.startswith(f"{group}.") and name.endswith(".attention.to_q.weight") for name in transformer)
        for place, modules in enumerate(MODULES):
            for block in range(depth):
                for layer, module in enumerate(modules):
                    name = f"{group}.{block}.{module}"
                    yield Target(name, f"{group}_lora", place * depth + block, layer, transformer[f"{name}.weight"])


class Projection(nn.Module):
    """Two linears; the numbers of one matrix for each picture."""

    def __init__(self, embedding: int, compressed: int, numbers: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(embedding, compressed, bias=False)
        self.proj_out = nn.Linear(compressed, numbers, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(pictures, embedding) float32 -> (pictures, numbers) float32."""
        out: Tensor = self.proj_out(self.proj_in(x.to(self.proj_in.weight.dtype))).float()
        return out


class Matrices(nn.Module):
    """Those of one module: what :class:`Generator` calls."""

    def __init__(self, config: Config, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.proj_a, self.proj_b = (
            Projection(config.embedding, config.compressed, width * config.rank) for width in reversed(shape)
        )


class Block(nn.Module):
    """The generators of some modules of one block."""

    def __init__(self, config: Config, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Matrices(config, shape) for shape in shapes)


class Group(nn.Module):
    """The generators for a group of blocks."""

    def __init__(self, config: Config, targets: list[Target]) -> None:
        super().__init__()
        count = 1 + max((target.block for target in targets), default=-1)
        shapes = [[target.shape for target in targets if target.block == block] for block in range(count)]
        self.blocks = nn.ModuleList(Block(config, own) for own in shapes)


class Generator(nn.Module):
    """Descriptions of pictures to the matrices of a LoRA for each."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.targets = config.targets
        for group in GROUPS:
            own = [target for target in config.targets if target.group == f"{group}_lora"]
            self.add_module(f"{group}_lora", Group(config, own))

    def forward(self, picture_embeds: Tensor) -> tuple[Tensor, ...]:
        """All matrices.

        Args:
            picture_embeds: (pictures, embedding) float32, SigLIP2's numbers before DINOv3's.

        Returns:
            For each target the matrix A of each picture, (pictures, rank * inputs) float32, and its matrix B,
            (pictures, outputs * rank).
        """
        made: list[Tensor] = []
        for target in self.targets:
            own = getattr(self, target.group).blocks[target.block].layers[target.layer]
            made += [own.proj_a(picture_embeds), own.proj_b(picture_embeds)]
        return tuple(made)


def part(config: Config) -> Part:
    """The component that a generator's file becomes."""
    names = (f"{target.name}.lora_{side}" for target in config.targets for side in "AB")
    return Part(
        SOURCE,
        lambda: Generator(config),
        inputs=(Input("picture_embeds", torch.float32, ("pictures", config.embedding)),),
        outputs=tuple(names),
        sizes=({"pictures": 3}, {"pictures": 5}),
    )
