"""What Fun ControlNets see of the pictures of a call. Source: ``ZImageUnit_PAIControlNet`` of DiffSynth-Studio 2.1."""

from __future__ import annotations

import numpy as np

from zimgkit.runtime.families.base import Array, ControlPictures, Encode
from zimgkit.runtime.pictures.resizing import resize, to_pixels

FACTOR = 8
"""Pixels in a latent, along each side."""


def condition(given: ControlPictures, encode: Encode, latents_shape: tuple[int, ...], *, inpaints: bool) -> Array:
    """The channels that a net sees beside the picture that is drawn.

    They are latents of the control picture, -1 where there is none; and, of nets that inpaint, a mask that is 0 where
    the picture is drawn anew, and latents of what stays, of grey where nothing is given.

    Args:
        given: the pictures; a mask and a picture to inpaint come together.
        encode: the VAE encoder.
        latents_shape: (channels, height / 8, width / 8) of what is drawn.
        inpaints: whether the net does.

    Returns:
        float32 (1, channels, height / 8, width / 8), or (1, 2 * channels + 1, height / 8, width / 8).
    """
    _, *sides = latents_shape
    height, width = (FACTOR * side for side in sides)
    control = np.full((1, *latents_shape), -1, np.float32) if given.image is None else encode(to_pixels(given.image))
    if not inpaints:
        return control
    kept, pixels = np.zeros((1, 1, *sides), np.float32), np.zeros((1, 3, height, width), np.float32)
    if given.mask is not None and given.inpaint_image is not None:
        sized = resize(given.mask, width, height, "bicubic")
        mask = np.asarray(sized).astype(np.float32).transpose(2, 0, 1)[None] / np.float32(255)
        kept = 1 - mask[:, :1, ::FACTOR, ::FACTOR]
        pixels = to_pixels(given.inpaint_image) * (mask < np.float32(0.5))
    return np.concatenate([control, kept, encode(pixels)], axis=1)
