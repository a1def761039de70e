"""Latents: from the image-shaped array of the VAE to the network's tokens and back, and the VAE's normalization.

A token is a patch of 2 x 2 latent pixels in all channels. The families order these numbers differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.decoding import Number, Positive, decoded
from zimgkit.engines.errors import CheckpointError

PATCH = 2

TokenLayout = Literal["c ph pw", "ph pw c"]
"""Order of a token's numbers, slowest first: "c ph pw" is channel, then row and column in the patch."""


def pack(latents: NDArray[np.float32], layout: TokenLayout) -> NDArray[np.float32]:
    """Cut latents into tokens, row by row.

    Args:
        latents: (batch, channels, h, w), h and w even.
        layout: the family's order of numbers in a token.

    Returns:
        (batch, h/2 * w/2, 4 * channels), of the same dtype.
    """
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    axes = (0, 2, 4, 1, 3, 5) if layout == "c ph pw" else (0, 2, 4, 3, 5, 1)
    tokens = (height // PATCH) * (width // PATCH)
    return patches.transpose(axes).reshape(batch, tokens, channels * PATCH * PATCH)


def unpack(tokens: NDArray[np.float32], layout: TokenLayout, height: int, width: int) -> NDArray[np.float32]:
    """Put tokens back into latents, the inverse of :func:`pack`.

    Args:
        tokens: (batch, height/2 * width/2, 4 * channels).
        layout: the family's order of numbers in a token.
        height: rows of the latents (an eighth of the picture's).
        width: columns of the latents.

    Returns:
        (batch, channels, height, width), of the same dtype.
    """
    batch, _, features = tokens.shape
    channels, rows, columns = features // PATCH**2, height // PATCH, width // PATCH
    if layout == "c ph pw":
        patches = tokens.reshape(batch, rows, columns, channels, PATCH, PATCH).transpose(0, 3, 1, 4, 2, 5)
    else:
        patches = tokens.reshape(batch, rows, columns, PATCH, PATCH, channels).transpose(0, 5, 1, 3, 2, 4)
    return patches.reshape(batch, channels, height, width)


class Normalization(NamedTuple):
    """How a VAE's raw latents become numbers of about unit variance: (raw - shift) * scale, channel by channel."""

    scale: NDArray[np.float32]
    """float32 (channels or 1, 1, 1)."""
    shift: NDArray[np.float32]
    """float32 (channels or 1, 1, 1)."""


class _Vae(msgspec.Struct, frozen=True):
    latents_mean: tuple[Number, ...] | None = None
    latents_std: tuple[Positive, ...] | None = None
    scaling_factor: Positive | None = None
    shift_factor: Number | None = None


def vae_normalization(config: Mapping[str, Any], where: str = "vae") -> Normalization:
    """Read a VAE's normalization from its ``config.json``.

    ``AutoencoderKL`` has one ``scaling_factor`` and ``shift_factor``; ``AutoencoderKLQwenImage`` has
    ``latents_mean`` and ``latents_std``, a number per channel.

    Args:
        config: the VAE's.
        where: how messages call it.

    Raises:
        CheckpointError: the config has neither pair, or what it has are no usable numbers.
    """
    found = decoded(config, _Vae, where, CheckpointError)
    mean, std = found.latents_mean, found.latents_std
    if mean is not None and std is not None:
        if mean and len(mean) == len(std):
            return Normalization(np.float32(1) / _channels(std), _channels(mean))
    elif found.scaling_factor is not None:
        return Normalization(_channels([found.scaling_factor]), _channels([found.shift_factor or 0.0]))
    raise CheckpointError(
        f"{where}: the config has no usable latents_mean and latents_std, nor scaling_factor and shift_factor"
    )


def _channels(values: Sequence[float]) -> NDArray[np.float32]:
    return np.asarray(values, np.float32).reshape(-1, 1, 1)


def normalize(raw: NDArray[np.float32], normalization: Normalization) -> NDArray[np.float32]:
    """From the VAE encoder's output to the network's latents; (batch, channels, h, w) float32."""
    return (raw - normalization.shift) * normalization.scale


def denormalize(latents: NDArray[np.float32], normalization: Normalization) -> NDArray[np.float32]:
    """From the network's latents to the VAE decoder's input; (batch, channels, h, w) float32."""
    return latents / normalization.scale + normalization.shift
