"""Rotary position embedding (Su et al. 2021): cosines and sines of position x frequency, computed once per size.

Which positions a family has, its own file says. A table row holds the angles of one token, one for each pair of numbers
in an attention head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import DTypeLike, NDArray

from zimgkit.engines.decoding import Positive, Small, Width, decoded
from zimgkit.engines.errors import CheckpointError


class Tables(NamedTuple):
    """Cosines and sines, each float32 (tokens, head_dim / 2)."""

    cos: NDArray[np.float32]
    sin: NDArray[np.float32]


def axis_tables(
    positions: NDArray[np.int64], dims: Sequence[int], theta: float, *, precision: DTypeLike = np.float32
) -> Tables:
    """Tables for positions on one or more axes, side by side in the order of the axes.

    Pair k of an axis of width d turns by position * theta^(-2k/d). A model is used to the rounding it was trained
    with, so ``precision`` says in which type its reference computes this angle. The angle then is a float32
    number, of which cosine and sine are taken as exactly as float32 can hold them.

    Args:
        positions: int64 (tokens, axes).
        dims: how many numbers of a head belong to each axis; even, they add up to head_dim.
        theta: the base of the frequencies.
        precision: the type of frequencies and products, float32 or float64.
    """
    angles = []
    for position, dim in zip(positions.T, dims, strict=True):
        exponent = np.arange(0, dim, 2, dtype=precision) / np.asarray(dim, precision)
        # The power in float64: numpy's float32 power depends on the processor.
        power = np.power(float(theta), exponent.astype(np.float64)).astype(precision)
        angles.append((position[:, None].astype(precision) * (1 / power)).astype(np.float32))
    angle = np.concatenate(angles, axis=1).astype(np.float64)
    return Tables(np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))


SECTIONS = (16, 24, 24)


class Rope(NamedTuple):
    """A text encoder's rotary embedding."""

    dim: int
    """Numbers in a head."""
    theta: float
    sections: tuple[int, int, int] = SECTIONS
    """Pairs of numbers for each axis, where positions have three (``mrope_section``)."""


class _Scaling(msgspec.Struct, frozen=True):
    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    mrope_section: tuple[Small, Small, Small] | None = None


class _TextEncoder(msgspec.Struct, frozen=True):
    rope_parameters: _Scaling | None = None
    rope_scaling: _Scaling | None = None
    rope_theta: Positive | None = None
    head_dim: Small | None = None
    hidden_size: Width | None = None
    num_attention_heads: Small | None = None


def text_encoder_rope(config: Mapping[str, Any], where: str = "text_encoder") -> Rope:
    """Read a text encoder's rotary embedding from its config.

    Args:
        config: the text part of the encoder's ``config.json``, of any transformers version.
        where: how messages call it.

    Raises:
        CheckpointError: the config has no theta or head size, or scales positions in a way zimgkit does not know.
    """
    found = decoded(config, _TextEncoder, where, CheckpointError)
    scaling = found.rope_parameters or found.rope_scaling or _Scaling()
    kind = scaling.rope_type or scaling.type or "default"
    if kind not in {"default", "mrope"}:
        raise CheckpointError(f"{where}: rope type {kind!r} is not known", "zimgkit knows 'default' and 'mrope'")
    theta = scaling.rope_theta or found.rope_theta
    if theta is None:
        raise CheckpointError(f"{where}: the config has no rope_theta")
    dim = found.head_dim or (found.hidden_size or 0) // (found.num_attention_heads or 1)
    if not dim or dim % 2:
        raise CheckpointError(f"{where}: the config has no even head_dim, nor hidden_size and num_attention_heads")
    return Rope(dim, theta, scaling.mrope_section or SECTIONS)


def text_encoder_tables(length: int, rope: Rope) -> Tables:
    """Tables for positions 0 ... length - 1 of a text encoder, as transformers has them for Qwen3 and Qwen2.5-VL.

    The three position axes of Qwen2.5-VL hold the same numbers for text, so that it is one axis here too.
    """
    return axis_tables(np.arange(length)[:, None], [rope.dim], rope.theta)


def grid(*axes: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """All combinations of positions on three axes, the last axis fastest: int64 (combinations, 3)."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
