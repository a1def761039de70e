"""The frequencies and levels of progressive resolution, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from zimgkit.runtime.diffusion.progressive import half_size, levels_at, low_frequencies, with_low_frequencies


def test_half_of_a_size_is_whole_tokens():
    assert half_size(1024, 768) == (512, 384)
    assert half_size(1328, 16) == (672, 16)  # 83 tokens and 1.


def test_levels():
    """Twice the side: the published 2 s / (1 + s) leads back. Ends stay, and the order does."""
    sigmas = np.linspace(0, 1, 33, dtype=np.float32)
    levels = levels_at(sigmas, 2.0)
    assert levels.dtype == np.float32
    np.testing.assert_allclose(2 * levels / (1 + levels), sigmas, atol=1e-6)
    assert (levels[0], levels[-1]) == (0, 1)
    odd = levels_at(sigmas[1:-1], 1.976)
    np.testing.assert_allclose(1.976 * odd / (1 - odd), sigmas[1:-1] / (1 - sigmas[1:-1]), rtol=1e-5)


def dct(values, axis):
    """The orthonormal DCT-II by the Fourier transform of a sequence and its mirror image."""
    count = values.shape[axis]
    index = np.arange(count)
    spectrum = np.fft.fft(np.concatenate([values, np.flip(values, axis)], axis), axis=axis).take(index, axis)
    scale = np.where(index == 0, (4 * count) ** -0.5, (2 * count) ** -0.5) * np.exp(-1j * np.pi * index / (2 * count))
    return (spectrum * np.expand_dims(scale, [own for own in range(values.ndim) if own != axis])).real


@pytest.mark.parametrize(("size", "small"), [((8, 12), (4, 6)), ((166, 2), (84, 2)), ((6, 10), (4, 6))])
def test_frequencies(size, small):
    """Low ones of the whole are the small one's, and high ones stay what they were."""
    rng = np.random.default_rng(0)
    latents, low = rng.standard_normal((2, 3, *size), np.float32), rng.standard_normal((2, 3, *small), np.float32)

    def both(values):
        return dct(dct(values.astype(np.float64), 2), 3)

    rows, columns = small
    np.testing.assert_allclose(both(low_frequencies(latents, *small)), both(latents)[..., :rows, :columns], atol=1e-5)
    found = with_low_frequencies(latents, low)
    assert found.dtype == np.float32
    expected = both(latents)
    expected[..., :rows, :columns] = both(low)
    np.testing.assert_allclose(both(found), expected, atol=1e-5)


def test_a_picture_without_high_frequencies_is_found_at_its_own_level():
    """Latents of the small size at the level s, enlarged, are those of the whole at sigma; and noise stays noise."""
    rng = np.random.default_rng(1)
    small, noise = rng.standard_normal((1, 4, 8, 8), np.float32), rng.standard_normal((1, 4, 16, 16), np.float32)
    whole = with_low_frequencies(np.zeros_like(noise), 2 * small)
    np.testing.assert_allclose(whole.mean(), small.mean(), atol=1e-6)
    sigma = np.float32(0.7)
    level = levels_at(sigma[None], 2.0)[0]
    begun = (1 - level) * small + level * low_frequencies(noise, 8, 8)
    grown = with_low_frequencies(sigma * noise, sigma / level * begun)
    np.testing.assert_allclose(grown, (1 - sigma) * whole + sigma * noise, atol=1e-5)
    many = low_frequencies(rng.standard_normal((64, 64, 16, 16), np.float32), 8, 8)
    assert abs(many.std() - 1) < 0.01
