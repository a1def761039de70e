"""Tiles that overlap, against the whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimgkit.runtime.pictures.tiles import SCALE, Array, Tiling, ignored, run_tiled, starts, weights

SIDES = st.integers(1, 60).map(lambda side: 2 * SCALE * side)
TILES = st.integers(2, 20).flatmap(
    lambda size: st.tuples(st.just(SCALE * size), st.integers(1, size - 1).map(SCALE.__mul__))
)


def enlarge(latents: Array) -> Array:
    """A decoder whose pixels depend on nothing but their own latent."""
    return latents[:, :3].repeat(SCALE, axis=2).repeat(SCALE, axis=3)


@given(SIDES, TILES)
def test_tiles_cover_a_side_and_overlap(side: int, tile: tuple[int, int]) -> None:
    size, overlap = tile
    begins = starts(side, size, overlap)
    assert begins[0] == 0
    assert begins[-1] == max(0, side - size)
    assert all(0 < b - a <= size - overlap for a, b in pairwise(begins))


@given(SIDES, TILES)
def test_the_weights_of_a_pixel_add_up_to_one(side: int, tile: tuple[int, int]) -> None:
    total = np.zeros(side)
    begins = starts(side // SCALE, tile[0] // SCALE, tile[1] // SCALE)
    for begin, weight in zip(begins, weights(side, *tile), strict=True):
        assert weight.min() > 0
        total[SCALE * begin : SCALE * begin + len(weight)] += weight
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_two_tiles_are_blended_linearly() -> None:
    left, right = weights(48, 32, 16)
    np.testing.assert_allclose(left[16:], 1 - (np.arange(16) + 0.5) / 16, rtol=1e-6)
    np.testing.assert_allclose(right[:16], (np.arange(16) + 0.5) / 16, rtol=1e-6)
    assert (left[:16] == 1).all()
    assert (right[16:] == 1).all()


@pytest.mark.parametrize(("height", "width"), [(2, 30), (31, 8), (16, 16), (9, 41)])
def test_where_pixels_depend_on_their_own_latents_tiles_change_nothing(height: int, width: int) -> None:
    tiling, seen = Tiling(64, 24, is_close=True), []
    latents = np.random.default_rng(0).standard_normal((1, 4, height, width)).astype(np.float32)
    done: list[tuple[int, int]] = []

    def decode(part: Array) -> Array:
        seen.append(part.shape[2:])
        return enlarge(part)

    found = run_tiled(decode, latents, tiling, (SCALE, 1), lambda *progress: done.append(progress))
    np.testing.assert_allclose(found, enlarge(latents), atol=1e-6)
    count = tiling.count(SCALE * height, SCALE * width)
    assert set(seen) == {(min(8, height), min(8, width))}
    assert len(seen) == count
    assert done == [(index, count) for index in range(count + 1)]


def test_what_reaches_as_far_as_half_the_overlap_is_exact_beside_the_seams() -> None:
    """A blur over 3 latents: only pixels within its reach of a tile's edge, whose weight is small, differ."""
    latents = np.random.default_rng(0).standard_normal((1, 3, 8, 40)).astype(np.float32)

    def blur(part: Array) -> Array:
        padded = np.pad(part, ((0, 0), (0, 0), (0, 0), (1, 1)))
        return enlarge((padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / 3)

    whole, found = blur(latents), run_tiled(blur, latents, Tiling(128, 64, is_close=True), (SCALE, 1), ignored)
    different = np.unique(np.nonzero(np.abs(found - whole) > 1e-6)[3]) // SCALE
    begins = starts(40, 16, 8)
    edges = set(begins[1:]) | {b + 15 for b in begins[:-1]}
    assert set(different) <= edges


def test_an_overlap_as_large_as_a_tile() -> None:
    with pytest.raises(ValueError, match="cannot overlap"):
        starts(100, 10, 10)


def test_how_tiles_are_told() -> None:
    tiling = Tiling(512, 128, is_close=True)
    assert str(tiling) == "512/384"
    assert [tiling.cuts(512, 512), tiling.cuts(512, 528)] == [False, True]
    assert (tiling.tile(256, 1024), tiling.count(256, 1024), tiling.count(1328, 1328)) == ((256, 512), 3, 16)
