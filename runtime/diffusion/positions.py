"""Rotary position embedding (Su et al. 2021): cosines and sines of position x frequency, computed once per size.

Which positions a family has, its own file says. A table row holds the angles of one token, one for each pair of numbers
in an attention head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

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


def text_encoder_tables(length: int, config: Mapping[str, Any]) -> Tables:
    """Tables for positions 0 ... length - 1 of a text encoder, as transformers has them for Qwen3 and Qwen2.5-VL.

    The three position axes of Qwen2.5-VL hold the same numbers for text, so that it is one axis here too.

    Args:
        length: tokens.
        config: the text part of the encoder's ``config.json``, of any transformers version.

    Raises:
        CheckpointError: the config has no theta, or scales its positions in a way zimgkit does not know.
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in {"default", "mrope"}:
        raise CheckpointError(f"text_encoder: rope type {kind!r} is not known", "zimgkit knows 'default' and 'mrope'")
    theta = scaling.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise CheckpointError("text_encoder: the config has no rope_theta")
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return axis_tables(np.arange(length)[:, None], [dim], theta)


def grid(*axes: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """All combinations of positions on three axes, the last axis fastest: int64 (combinations, 3)."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
