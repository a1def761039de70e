"""Pictures that a prompt speaks of: rows for the text encoder, and latents beside those that are drawn."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import ReferencePictures
from zimgkit.engines.errors import BackendError
from zimgkit.runtime.encoding import Encoder
from zimgkit.runtime.engine_pool import EnginePool
from zimgkit.runtime.families.base import Array, PictureFamily
from zimgkit.runtime.inputs import InputPicture, Inputs, reduced_size
from zimgkit.runtime.parameters import MULTIPLE
from zimgkit.runtime.pictures.reading import flattened
from zimgkit.runtime.pictures.resizing import calculate_dimensions, resize

COMPONENT = "vision_encoder"
MOST_KEPT = 16
"""Pictures whose rows are kept; a picture of a megapixel takes 20 MB."""
Size = tuple[int, int]
"""Width and height."""


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


def layouts(inputs: Inputs, config: ReferencePictures, family: PictureFamily) -> tuple[Layout, ...]:
    """How large the pictures of a call are where they are read; nothing is read for that.

    Pictures that are not resized keep their size, in multiples of 16, as DiffSynth's ``edit_image_auto_resize=False``
    has it; those that a prompt numbers are read by the vision encoder in its own area all the same.

    Raises:
        UsageError: one is more than 200 times as wide as high, or as high as wide.
    """
    found = []
    for picture in inputs.references:
        reduced = None
        if config.crops:
            vision = reduced = reduced_size(picture, inputs, config)
            latents = _whole_tokens(reduced)
        else:
            ratio = picture.size[0] / picture.size[1]
            vision = calculate_dimensions(config.vision_area, ratio)
            latents = calculate_dimensions(config.latents_area, ratio)
            if not inputs.edit_image_auto_resize:
                latents = _whole_tokens(picture.size)
                vision = vision if config.introduction else latents
        rows, columns = family.vision_grid(*vision)
        found.append(Layout(vision, (rows, columns), rows * columns // family.merge**2, latents, reduced))
    return tuple(found)


def _whole_tokens(size: Size) -> Size:
    width, height = (max(MULTIPLE, side // MULTIPLE * MULTIPLE) for side in size)
    return width, height


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
        found = layouts(inputs, config, self._family)
        both = list(zip(inputs.references, found, strict=True))
        rows = tuple(self._rows(picture, layout, device_of(COMPONENT)) for picture, layout in both)
        encode, device = self._encoder.encode, device_of(self._encoder.COMPONENT)
        latents = tuple(
            encode(picture, *layout.latents[::-1], device, reduced=layout.reduced) for picture, layout in both
        )
        return References(found, rows, latents)

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
