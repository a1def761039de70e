"""What the benchmarks ask of a family: its configs in three sizes, and how diffusers' classes are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
Configs = Mapping[str, Config]
"""Component -> config, or what it has instead of another one's."""


@dataclass(frozen=True)
class Editing:
    """How diffusers edits pictures with a family."""

    pipeline: str
    """The name of diffusers' pipeline."""
    reference: str
    """The name of the tests' tiny one."""
    configs: Configs
    """What makes that one larger, beside ``mid_size``."""
    areas: tuple[str, str]
    """What the pipeline's module calls the pixels that the vision encoder reads of a picture, and the VAE encoder."""


@dataclass(frozen=True)
class Controlling:
    """The largest kind of ControlNet that a family has."""

    shapes: Callable[[Config], dict[str, tuple[int, ...]]]
    """Its tensors, by their names in its file, from the transformer's config."""
    products: Callable[[Config, int, int], tuple[int, int]]
    """The operations that it adds to a forward, and those among them that read the picture alone; from the same config,
    image tokens and text tokens."""


@dataclass(frozen=True)
class BenchmarkFamily:
    """A family as the benchmarks know it."""

    pipeline: str
    """The name of diffusers' pipeline."""
    scale: str
    """That pipeline's argument for the guidance scale."""
    configs: Configs
    """Of the released checkpoint."""
    shards: Mapping[str, int]
    """Component -> in how many files the released checkpoint stores it."""
    mid_size: Configs
    """What makes the tests' tiny models larger: a few hundred million parameters, and the real VAE."""
    ggml_size: Configs | None
    """The same for a comparison with stable-diffusion.cpp, in sizes that it computes; None where there are none."""
    deep: Config
    """What makes the tests' tiny transformer as deep as the real one of the larger family, and narrow."""
    tiny: Config
    """What makes the real transformer tiny."""
    depth: str
    """What the transformer's config calls the number of its blocks."""
    text_width: str
    """What it calls the width of the embeddings that it takes."""
    products: Callable[[Config, int, int], int]
    """The operations of one forward of diffusers' transformer, from its config, image tokens and text tokens."""
    time: Callable[[float], float]
    """The time that the transformer is given for a noise level."""
    forward: Callable[[Any, Any, Any, Any, tuple[int, int, int]], Any]
    """Calls diffusers' transformer for one picture: the network, latents in the pipeline's form, time (1,), embeddings
    (tokens, hidden), and frames, rows and columns of the image's tokens."""
    velocity: Callable[[Any], Any]
    """What that gave, as the velocity in the form of the latents; of an array."""
    control: Controlling
    """Its ControlNets."""
    editing: Editing | None = None
    """How it edits; None where it does not."""


def arguments(config: Config) -> dict[str, Any]:
    """A config as the arguments of its class: without what says which one that is."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
