"""Pictures that a prompt speaks of: rows for the text encoder, and latents beside those that are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import ReferencePictures
from zimgkit.engines.errors import BackendError
from zimgkit.runtime.encoding import Encoder
from zimgkit.runtime.engine_pool import EnginePool
from zimgkit.runtime.families.base import Array, PictureFamily
from zimgkit.runtime.inputs import NONE, InputPicture, Inputs, reduced_size
from zimgkit.runtime.parameters import MULTIPLE
from zimgkit.runtime.pictures.reading import flattened
from zimgkit.runtime.pictures.resizing import calculate_dimensions, resize
from zimgkit.runtime.recent import Recent

COMPONENT = "vision_encoder"
MOST_KEPT = 16
"""Pictures whose rows are kept; a picture of a megapixel takes 20 MB."""
Size = tuple[int, int]
"""Width and height."""
RATIOS = (1.0, *(2 ** (step / 512) for step in range(-1024, 1025)))
"""Widths by heights that engines are compiled for: up to 4 times as wide as high, and as high as wide."""


@dataclass(frozen=True)
class Layout:
    """How large one picture is where it is read."""

    vision: Size
    """Pixels that the vision encoder is given."""
    patches: Size
    """Rows and columns of its patches."""
    tokens: int
    """Rows that the vision encoder gives for the picture."""
    latents: Size
    """Pixels whose latents stand beside those that are drawn."""
    reduced: Size | None = None
    """Pixels that the picture is resized to before its edges are cut off for those, where they are."""

    @property
    def grid(self) -> Size:
        """Rows and columns of the tokens of its latents."""
        width, height = self.latents
        return height // MULTIPLE, width // MULTIPLE


@dataclass(frozen=True, eq=False)
class References:
    """The pictures of a call, read."""

    layouts: tuple[Layout, ...]
    rows: tuple[Array, ...]
    """Of each, float32 (tokens, hidden)."""
    latents: tuple[Array, ...]
    """Likewise, float32 (1, ...) in the form that the family keeps them in, without noise."""


def layout(size: Size, inputs: Inputs, config: ReferencePictures, family: PictureFamily) -> Layout:
    """How large a picture of a call is where it is read.

    Pictures that are not resized keep their size, in multiples of 16, as DiffSynth's ``edit_image_auto_resize=False``
    has it; those that a prompt numbers are read by the vision encoder in its own area all the same.

    Raises:
        UsageError: one is more than 200 times as wide as high, or as high as wide.
    """
    ratio, reduced = size[0] / size[1], None
    if config.crops:
        vision = reduced = reduced_size(size, inputs, config)
        latents = _whole_tokens(reduced)
    else:
        vision = calculate_dimensions(config.vision_area, ratio)
        latents = calculate_dimensions(config.latents_area, ratio)
        if not inputs.edit_image_auto_resize:
            latents = _whole_tokens(size)
            vision = vision if config.introduction else latents
    rows, columns = family.vision_grid(*vision)
    return Layout(vision, (rows, columns), rows * columns // family.merge**2, latents, reduced)


def layouts(inputs: Inputs, config: ReferencePictures, family: PictureFamily) -> tuple[Layout, ...]:
    """:func:`layout` of each picture of a call; none is read for that."""
    return tuple(layout(picture.size, inputs, config, family) for picture in inputs.references)


def _whole_tokens(size: Size) -> Size:
    width, height = (max(MULTIPLE, side // MULTIPLE * MULTIPLE) for side in size)
    return width, height


def dimension_ranges(config: ReferencePictures, family: PictureFamily) -> dict[str, tuple[int, int, int]]:
    """Min, opt and max of the dynamic dimensions of what reads pictures, of :data:`RATIOS` and as many as it takes.

    ``conditions`` among them is how many tokens the denoiser has of all pictures.

    Args:
        config: how the bundle takes pictures.
        family: of the bundle.
    """
    side = math.sqrt(config.latents_area)
    sizes = [(round(side * math.sqrt(ratio)), round(side / math.sqrt(ratio))) for ratio in RATIOS]
    if config.crops:  # Smaller ones stay as they are.
        sizes.append((config.shortest_side, config.shortest_side))
    found = [layout(size, NONE, config, family) for size in sizes]
    few = [_lengths([own], family) for own in found]
    many = [_lengths([own] * config.most, family) for own in found]
    each = [
        family.vision_dimensions(own.patches) | {"image_width": own.latents[0], "image_height": own.latents[1]}
        for own in found
    ]
    alone = {name: (min(one[name] for one in each), each[0][name], max(one[name] for one in each)) for name in each[0]}
    return alone | {
        name: (min(one[name] for one in few), few[0][name], max(one[name] for one in many)) for name in few[0]
    }


def _lengths(pictures: Sequence[Layout], family: PictureFamily) -> dict[str, int]:
    """Of what the denoiser and the text encoder are given of these pictures together."""
    grids, patches = ([own.grid for own in pictures], [own.patches for own in pictures])
    return family.reading_dimensions(grids, patches) | {"conditions": family.condition_tokens(grids, patches)}


class ReferenceReader:
    """The vision encoder of a session, and what it gave for the pictures that it read last.

    Args:
        engines: of the bundle.
        family: of the bundle.
        encoder: makes latents of pictures.
    """

    def __init__(self, engines: EnginePool, family: PictureFamily, encoder: Encoder) -> None:
        self._engines = engines
        self._family = family
        self._encoder = encoder
        self._kept: Recent[tuple[str, Size], Array] = Recent(MOST_KEPT)

    def read(self, inputs: Inputs, config: ReferencePictures, device_of: Callable[[str], str | None]) -> References:
        """Read the pictures of a call; what was read lately is not read again.

        Args:
            inputs: of the call.
            config: how the bundle takes them.
            device_of: component -> where it runs.

        Raises:
            BackendError: an engine failed, or gave NaN or Inf.
        """
        found = layouts(inputs, config, self._family)
        both = list(zip(inputs.references, found, strict=True))
        device = device_of(COMPONENT)
        rows = tuple(
            self._kept.get((picture.sha256, layout.vision), partial(self._rows, picture, layout, device))
            for picture, layout in both
        )
        encode, device = self._encoder.encode, device_of(self._encoder.COMPONENT)
        latents = tuple(
            encode(picture, *layout.latents[::-1], device, reduced=layout.reduced) for picture, layout in both
        )
        return References(found, rows, latents)

    def _rows(self, picture: InputPicture, layout: Layout, device: str | None) -> Array:
        """What the vision encoder makes of one picture, float32 (tokens, hidden), row by row."""
        inputs = self._family.vision_inputs(resize(flattened(picture.picture), *layout.vision))
        with self._engines.engine(COMPONENT, device) as engine:
            found: NDArray[np.float32] = engine.run(inputs.feeds)["picture_embeds"][inputs.inverse]
        if not np.isfinite(found).all():
            raise BackendError("the vision encoder gave NaN or Inf", "zimg-export verify checks the bundle")
        return found
