"""A picture decoded or encoded in tiles that overlap, blended linearly: memory for a tile is enough for any."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
SCALE = 8
"""Pixels of a latent, each way."""


def ignored(done: int, total: int) -> None:
    """Progress that nobody asks for."""


@dataclass(frozen=True)
class Tiling:
    """Tiles, in pixels; multiples of 8."""

    size: int
    """Of a side. A shorter side of a picture is not cut."""
    overlap: int
    """Of neighbours, at least."""
    is_close: bool
    """Whether the picture is that of the whole decode but for small differences."""

    def __str__(self) -> str:
        """Size and stride, as ``"512/384"``."""
        return f"{self.size}/{self.size - self.overlap}"

    def cuts(self, height: int, width: int) -> bool:
        """Whether a picture of this size is larger than a tile."""
        return max(height, width) > self.size

    def tile(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the tiles of a picture: all of them have the same."""
        return min(height, self.size), min(width, self.size)

    def count(self, height: int, width: int) -> int:
        """How many tiles a picture has."""
        return len(starts(height, self.size, self.overlap)) * len(starts(width, self.size, self.overlap))


def starts(side: int, size: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: as few as cover it, spread evenly. All arguments are in one unit.

    Raises:
        ValueError: the overlap is as large as a tile.
    """
    if overlap >= size:
        raise ValueError(f"tiles of {size} cannot overlap by {overlap}")
    if side <= size:
        return [0]
    count = math.ceil((side - overlap) / (size - overlap))
    return [(side - size) * index // (count - 1) for index in range(count)]


def weights(side: int, size: int, overlap: int, scale: int = 1) -> list[Array]:
    """What each tile counts for along a side; the weights of every element add up to one.

    A tile's weight falls off linearly where it overlaps with its neighbours, and not at the picture's edges.

    Args:
        side: of the picture, in pixels.
        size: of a tile.
        overlap: of neighbours.
        scale: pixels of an element.
    """
    begins = [SCALE * start // scale for start in starts(side // SCALE, size // SCALE, overlap // SCALE)]
    side, size = side // scale, min(side, size) // scale
    total = np.zeros(side)
    ramps = []
    for begin in begins:
        inside = np.arange(size) + 0.5
        left = scale * inside / overlap if begin > 0 else np.ones(size)
        right = scale * (size - inside) / overlap if begin + size < side else np.ones(size)
        ramps.append(np.minimum(1, np.minimum(left, right)))
        total[begin : begin + size] += ramps[-1]
    return [(ramp / total[begin : begin + size]).astype(np.float32) for begin, ramp in zip(begins, ramps, strict=True)]


def run_tiled(
    run: Callable[[Array], Array],
    whole: Array,
    tiling: Tiling,
    scales: tuple[int, int],
    progress: Callable[[int, int], None],
) -> Array:
    """Decode or encode one picture tile by tile.

    Args:
        run: of a tile, float32 (1, channels, h, w) to float32 (1, channels, h, w).
        whole: what it is given, of the whole picture.
        tiling: the tiles.
        scales: pixels of an element each way, of what it is given and of what it gives: 1, or 8 of latents.
        progress: called with how many tiles are done, and how many there are.

    Returns:
        What it gives for the whole picture, float32.
    """
    taken, given = scales
    rows, columns = (side * taken // SCALE for side in whole.shape[2:])
    size, overlap = tiling.size // SCALE, tiling.overlap // SCALE
    tops, lefts = starts(rows, size, overlap), starts(columns, size, overlap)
    down, across = (weights(SCALE * side, tiling.size, tiling.overlap, given) for side in (rows, columns))
    places = [(row, column) for row in range(len(tops)) for column in range(len(lefts))]
    for done, (row, column) in enumerate(places):
        progress(done, len(places))
        top, left = SCALE * tops[row], SCALE * lefts[column]
        own = (slice(begin // taken, (begin + tiling.size) // taken) for begin in (top, left))
        tile = run(whole[:, :, *own])
        channels, height, width = tile.shape[1:]
        if not done:
            picture = np.zeros((1, channels, SCALE * rows // given, SCALE * columns // given), np.float32)
        y, x = top // given, left // given
        picture[:, :, y : y + height, x : x + width] += tile * down[row][:, None] * across[column]
    progress(len(places), len(places))
    return picture
