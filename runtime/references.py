"""Pictures that a prompt speaks of: rows for the text encoder, and latents beside those that are drawn."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import ReferencePictures
from zimgkit.engines.errors import BackendError
from zimgkit.runtime.encoding import Encoder
from zimgkit.runtime.engine_pool import EnginePool
from zimgkit.runtime.families.base import Array, ConditionedFamily
from zimgkit.runtime.inputs import InputPicture, Inputs
from zimgkit.runtime.parameters import MULTIPLE
from zimgkit.runtime.pictures.reading import flattened
from zimgkit.runtime.pictures.resizing import calculate_dimensions, resize

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
    """Of the prompt that stand for the picture."""
    latents: Size
    """Pixels whose latents stand beside those that are drawn."""

    @property
    def grid(self) -> Size:
        """Rows and columns of the tokens of its latents."""
        width, height = self.latents
        return height // MULTIPLE, width // MULTIPLE


@dataclass(frozen=True, eq=False)
class References:
    """The pictures of a call, read."""

    layouts: tuple[Layout, ...]
    rows: Array
    """Float32 (picture tokens, hidden), of all pictures."""
    latents: Array
    """Float32 (1, condition tokens, 4 * channels), likewise, without noise."""


def layouts(
    sizes: Iterable[Size], config: ReferencePictures, family: ConditionedFamily, *, auto_resize: bool = True
) -> tuple[Layout, ...]:
    """How large the pictures of a call are where they are read.

    Pictures that are not resized keep their size, in multiples of 16, as DiffSynth's ``edit_image_auto_resize=False``
    has it; those that a prompt numbers are read by the vision encoder in its own area all the same.

    Raises:
        UsageError: one is more than 200 times as wide as high, or as high as wide.
    """
    found = []
    for size in sizes:
        ratio = size[0] / size[1]
        vision = calculate_dimensions(config.vision_area, ratio)
        latents = calculate_dimensions(config.latents_area, ratio)
        if not auto_resize:
            width, height = (max(MULTIPLE, side // MULTIPLE * MULTIPLE) for side in size)
            latents = width, height
            vision = vision if config.introduction else latents
        rows, columns = family.vision_grid(*vision)
        merged = family.vision.spatial_merge_size**2
        found.append(Layout(vision, (rows, columns), rows * columns // merged, latents))
    return tuple(found)


def layouts_of(inputs: Inputs, config: ReferencePictures, family: ConditionedFamily) -> tuple[Layout, ...]:
    """:func:`layouts` of the pictures of a call; none is read for that."""
    sizes = [picture.size for picture in inputs.references]
    return layouts(sizes, config, family, auto_resize=inputs.edit_image_auto_resize)


def dimension_ranges(config: ReferencePictures, family: ConditionedFamily) -> dict[str, tuple[int, int, int]]:
    """Min, opt and max of the dynamic dimensions of what reads pictures, of :data:`RATIOS` and as many as it takes.

    Args:
        config: how the bundle takes pictures.
        family: of the bundle.
    """
    found = layouts([(round(1000 * ratio), 1000) for ratio in RATIOS], config, family)
    window = family.vision.window * family.vision.spatial_merge_size

    def each(of: Callable[[Layout], int], most: int = 1) -> tuple[int, int, int]:
        numbers = [of(layout) for layout in found]
        return min(numbers), numbers[0], most * max(numbers)

    return {
        "patches": each(lambda layout: math.prod(layout.patches)),
        "windows": each(lambda layout: math.prod(-(-side // window) for side in layout.patches)),
        "picture_tokens": each(lambda layout: layout.tokens, config.most),
        "condition_tokens": each(lambda layout: math.prod(layout.grid), config.most),
        "image_height": each(lambda layout: layout.latents[1]),
        "image_width": each(lambda layout: layout.latents[0]),
    }


class ReferenceReader:
    """The vision encoder of a session, and what it gave for the pictures that it read last.

    Args:
        engines: of the bundle.
        family: of the bundle.
        encoder: makes latents of pictures.
    """

    def __init__(self, engines: EnginePool, family: ConditionedFamily, encoder: Encoder) -> None:
        self._engines = engines
        self._family = family
        self._encoder = encoder
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, Size], Array] = OrderedDict()

    def read(self, inputs: Inputs, config: ReferencePictures, device_of: Callable[[str], str | None]) -> References:
        """Read the pictures of a call; what was read lately is not read again.

        Args:
            inputs: of the call.
            config: how the bundle takes them.
            device_of: component -> where it runs.

        Raises:
            BackendError: an engine failed, or gave NaN or Inf.
        """
        found = layouts_of(inputs, config, self._family)
        both = list(zip(inputs.references, found, strict=True))
        rows = [self._rows(picture, layout, device_of(COMPONENT)) for picture, layout in both]
        encode, device = self._encoder.encode, device_of(self._encoder.COMPONENT)
        latents = [encode(picture, layout.latents[1], layout.latents[0], device) for picture, layout in both]
        return References(found, np.concatenate(rows), np.concatenate(latents, axis=1))

    def _rows(self, picture: InputPicture, layout: Layout, device: str | None) -> Array:
        """What the vision encoder makes of one picture, float32 (tokens, hidden), row by row."""
        key = (picture.sha256, layout.vision)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        inputs = self._family.vision_inputs(resize(flattened(picture.picture), *layout.vision))
        with self._engines.engine(COMPONENT, device) as engine:
            found: NDArray[np.float32] = engine.run(inputs.feeds)["picture_embeds"][inputs.inverse]
        if not np.isfinite(found).all():
            raise BackendError("the vision encoder gave NaN or Inf", "zimg-export verify checks the bundle")
        with self._lock:
            self._kept[key] = found
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return found
