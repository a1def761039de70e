"""What masks do to a picture: where its latents are drawn anew, its own pixels put back, and which regions it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from zimgkit.runtime.inputs import Inputs

Array = NDArray[np.float32]


def latents_drawn_anew(inputs: Inputs, height: int, width: int) -> Array | None:
    """Where latents are drawn anew: 1, and 0 where the picture is kept; None where there is no mask.

    Args:
        inputs: of the call.
        height: of what is drawn, in pixels.
        width: likewise.

    Returns:
        float32 (height / 8, width / 8).

    Raises:
        UsageError: the blur is larger than the picture.
    """
    from zimgkit.runtime.pictures.masks import SCALE, latent_mask, read_mask, soft_latent_mask

    if inputs.mask_image is None:
        return None
    if inputs.mask_blur:
        return pixels_drawn_anew(inputs, height, width)[::SCALE, ::SCALE]
    mask = read_mask(inputs.mask_image.picture)
    if inputs.blends_velocity:
        return soft_latent_mask(mask, height, width, inputs.inpaint_blur_size, inputs.inpaint_blur_sigma)
    return latent_mask(mask, height, width)


def pixels_drawn_anew(inputs: Inputs, height: int, width: int) -> Array:
    """Likewise of pixels: the mask at the picture's size, each pixel 0 or 1, and then blurred as was asked for."""
    from zimgkit.runtime.pictures.masks import SCALE, blur, read_mask
    from zimgkit.runtime.pictures.resizing import resize

    if inputs.mask_image is None:
        return np.ones((height, width), np.float32)
    sized = read_mask(resize(inputs.mask_image.picture, width, height))
    whole = (sized >= np.float32(0.5)).astype(np.float32)
    return blur(whole, inputs.mask_blur or SCALE * (inputs.inpaint_blur_sigma or 0))


def keep_unmasked(drawn: Array, inputs: Inputs) -> Array:
    """A drawn picture with the pixels of the one it was drawn from where the mask keeps them.

    Args:
        drawn: float32 (height, width, 3) from 0 to 1.
        inputs: of the call.

    Returns:
        float32 (height, width, 3); the same array where nothing is kept.
    """
    from zimgkit.runtime.pictures.reading import flattened
    from zimgkit.runtime.pictures.resizing import resize

    if inputs.image is None or inputs.mask_image is None or not inputs.keep_unmasked:
        return drawn
    height, width = drawn.shape[:2]
    anew = pixels_drawn_anew(inputs, height, width)[..., None]
    own = np.asarray(resize(flattened(inputs.image.picture), width, height), np.float32) / np.float32(255)
    mixed: Array = drawn * anew + own * (1 - anew)
    return mixed


def image_regions(inputs: Inputs, grids: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which of the pictures' tokens each region has: those that its mask touches.

    As EliGen of DiffSynth-Studio has it: the mask is resized to the latents' grid (nearest), counts where it is more
    white than black, and a token has four latents. Pictures beside the one that is drawn have the same regions; there
    all have one size.

    Args:
        inputs: of the call.
        grids: rows and columns of the tokens of what is drawn, and of the pictures beside it.

    Returns:
        bool (regions, tokens of all).

    Raises:
        UsageError: a mask touches no token.
    """
    from zimgkit.runtime.pictures.reading import flattened

    found = []
    for number, entity in enumerate(inputs.eligen_entity_masks, start=1):
        mask = flattened(entity.picture, 0)
        each = [touched_tokens(mask, *grid) for grid in grids]
        if not each[0].any():
            raise UsageError(f"the mask of entity {number} covers nothing", "paint its region white")
        found.append(np.concatenate(each))
    return np.stack(found)


def touched_tokens(mask: Image, rows: int, columns: int) -> NDArray[np.bool_]:
    """Which tokens of a picture a mask, RGB, touches: bool (rows * columns,)."""
    from PIL.Image import Resampling

    white = np.asarray(mask.resize((2 * columns, 2 * rows), Resampling.NEAREST), np.float32).mean(axis=2) > 127.5
    seen: NDArray[np.bool_] = white.reshape(rows, 2, columns, 2).any(axis=(1, 3)).reshape(-1)
    return seen
