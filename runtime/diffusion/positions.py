"""Rotary position embedding (Su et al. 2021): cosines and sines of position x frequency, computed once per size.

:func:`axis_tables` makes the tables for any positions; the rest of the file says which positions a family has.
A table row holds the angles of one token, one for each pair of numbers in an attention head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from zimgkit.engines.errors import CheckpointError, UsageError


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


# Qwen-Image: diffusers' QwenEmbedRope with scale_rope.

QWEN_IMAGE_THETA = 10000.0


def qwen_image_positions(height: int, width: int) -> NDArray[np.int64]:
    """Positions (frame, row, column) of an image's tokens, row by row, with the origin in the middle.

    Args:
        height: rows of the token grid (a sixteenth of the picture's), such as 83.
        width: columns of the token grid.

    Returns:
        int64 (height * width, 3).
    """
    return _grid(0, np.arange(height) - (height - height // 2), np.arange(width) - (width - width // 2))


def qwen_image_text_positions(length: int, height: int, width: int) -> NDArray[np.int64]:
    """Positions of text tokens: the same number on all axes, counting on from the edge of the image's grid.

    Args:
        length: text tokens.
        height: rows of the image's token grid.
        width: columns of the image's token grid.

    Returns:
        int64 (length, 3).
    """
    start = max(height // 2, width // 2)
    return np.repeat(np.arange(start, start + length)[:, None], 3, axis=1)


def qwen_image_tables(positions: NDArray[np.int64], config: Mapping[str, Any]) -> Tables:
    """Tables for Qwen-Image's transformer; ``config`` is its ``config.json``."""
    return axis_tables(positions, config["axes_dims_rope"], QWEN_IMAGE_THETA)


# Z-Image: diffusers' ZImageTransformer2DModel.patchify_and_embed and RopeEmbedder.

Z_IMAGE_MULTIPLE = 32


def z_image_padded(length: int) -> int:
    """How many tokens a caption or an image of ``length`` tokens takes up: the next multiple of 32."""
    return -(-length // Z_IMAGE_MULTIPLE) * Z_IMAGE_MULTIPLE


def z_image_pad_mask(length: int) -> NDArray[np.bool_]:
    """Which tokens of the padded sequence are pads: bool (padded length,), False for the first ``length``."""
    return np.arange(z_image_padded(length)) >= length


def z_image_caption_positions(length: int) -> NDArray[np.int64]:
    """Positions of a caption's tokens: 1, 2, ... on the first axis, running on through the pads.

    Returns:
        int64 (padded length, 3).
    """
    return _grid(np.arange(1, z_image_padded(length) + 1), 0, 0)


def z_image_positions(height: int, width: int, caption_length: int) -> NDArray[np.int64]:
    """Positions of an image's tokens, row by row: one step past the padded caption, row, column; pads at the origin.

    Args:
        height: rows of the token grid (a sixteenth of the picture's).
        width: columns of the token grid.
        caption_length: tokens of the caption without its pads.

    Returns:
        int64 (padded height * width, 3).
    """
    positions = np.zeros((z_image_padded(height * width), 3), np.int64)
    positions[: height * width] = _grid(z_image_padded(caption_length) + 1, np.arange(height), np.arange(width))
    return positions


def z_image_tables(positions: NDArray[np.int64], config: Mapping[str, Any]) -> Tables:
    """Tables for Z-Image's transformer; ``config`` is its ``config.json``.

    Raises:
        UsageError: a position past the model's ``axes_lens``: the caption or the picture is too large.
    """
    captions, rows, columns = config["axes_lens"]
    # The image's own position comes after the caption's, and a caption is a multiple of 32 long.
    longest = (captions - 2) // Z_IMAGE_MULTIPLE * Z_IMAGE_MULTIPLE
    most = (f"{longest} prompt tokens", f"{16 * rows} pixels of height", f"{16 * columns} pixels of width")
    for highest, length, limit in zip(positions.max(axis=0), (captions, rows, columns), most, strict=True):
        if highest >= length:
            raise UsageError(f"too large for this model, which takes {limit} at most", "ask for less")
    return axis_tables(positions, config["axes_dims"], config["rope_theta"], precision=np.float64)


# Text encoders: transformers' rotary embeddings of Qwen3 and Qwen2.5-VL, for text alone.


def text_encoder_tables(length: int, config: Mapping[str, Any]) -> Tables:
    """Tables for positions 0 ... length - 1 of a text encoder.

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


def _grid(*axes: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """All combinations of positions on three axes, the last axis fastest: int64 (combinations, 3)."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
