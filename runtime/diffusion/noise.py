"""Noise: the numbers that ``torch.randn`` draws from a seeded CPU generator, drawn without torch.

The generator is MT19937 seeded with one 32-bit word (Matsumoto and Nishimura 1998), which numpy has too.
Uniform numbers become normal ones by the transform of Box and Muller (1958), in torch's order.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import UsageError

BLOCK = 16
"""Torch transforms this many numbers at once, and goes one by one where a draw is smaller."""
SKIPPED = 1 << 20
"""Random words that are made and dropped at a time."""


class Generator:
    """A stream of normal numbers that goes on from draw to draw as ``torch.Generator("cpu").manual_seed(seed)`` does.

    Args:
        seed: an integer in -2**63 ... 2**64 - 1. As in torch, negative ones count from 2**64 down, and only the
            lowest 32 bits matter.

    Raises:
        UsageError: the seed is no integer, or out of this range.
    """

    def __init__(self, seed: int) -> None:
        try:
            number = operator.index(seed)
        except TypeError:
            raise UsageError(f"seed {seed!r} is not an integer") from None
        if not -(2**63) <= number < 2**64:
            raise UsageError(f"seed {number} is out of range", "give one between 0 and 18446744073709551615")
        self._words = np.random.RandomState(number & 0xFFFFFFFF)
        self._spare: float | None = None

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Draw independent normal numbers of mean 0 and variance 1.

        Where torch was built for AVX2, as on any x86 machine of today, its own approximations of the logarithm and
        of the circle functions differ from these by 5e-7 at most. A torch draw in bfloat16 is this draw rounded.

        Args:
            shape: the sides of the array; any number of them, each 0 or more.

        Returns:
            float32 array of this shape.
        """
        size = math.prod(shape)
        values = self._small(size) if size < BLOCK else self._large(size)
        return values.reshape(tuple(shape))

    def skip(self, count: int) -> None:
        """Go past what a draw of ``count`` numbers, a multiple of 16, would use; in little memory."""
        for start in range(0, count, SKIPPED):
            self._words.bytes(4 * min(SKIPPED, count - start))

    def _random32(self, count: int) -> NDArray[np.uint32]:
        return np.frombuffer(self._words.bytes(4 * count), "<u4")

    def _large(self, size: int) -> NDArray[np.float32]:
        values = np.empty(size, np.float32)
        whole = size - size % BLOCK
        values[:whole] = _box_muller(self._random32(size)[:whole])
        if whole != size:
            # The last block of an uneven draw overlaps the one before, and has words of its own.
            values[-BLOCK:] = _box_muller(self._random32(BLOCK))
        return values

    def _small(self, size: int) -> NDArray[np.float32]:
        """Below one block torch draws in float64, two numbers at a time, and keeps the second for the next draw."""
        values = np.empty(size, np.float32)
        for i in range(size):
            if self._spare is None:
                high_angle, low_angle, high_radius, low_radius = self._random32(4).tolist()
                angle = 2.0 * math.pi * _uniform53(high_angle, low_angle)
                radius = math.sqrt(-2.0 * math.log1p(-_uniform53(high_radius, low_radius)))
                values[i], self._spare = radius * math.cos(angle), radius * math.sin(angle)
            else:
                values[i], self._spare = self._spare, None
        return values


def _uniform53(high: int, low: int) -> float:
    return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def _box_muller(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Turn blocks of 16 random words into normal numbers: 8 words for the radii, 8 for the angles; cosines, then sines.

    Every step is rounded to float32 as in torch. Logarithm, sine and cosine are taken in float64 first, so that
    the same noise comes out on every machine: numpy's own float32 versions depend on the processor.
    """
    uniform = ((words & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)).reshape(-1, 2, BLOCK // 2)
    log = np.log(1.0 - uniform[:, 0].astype(np.float64)).astype(np.float32)
    radius = np.sqrt(np.float32(-2.0) * log)
    angle = (np.float32(2.0 * math.pi) * uniform[:, 1]).astype(np.float64)
    cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)


Source = int | Generator
"""A seed, or a generator that goes on from what it has drawn."""


def randn_tensor(shape: Sequence[int], sources: Source | Sequence[Source]) -> NDArray[np.float32]:
    """Draw the noise of a batch, as ``diffusers.utils.torch_utils.randn_tensor`` does with CPU generators.

    Args:
        shape: (batch, ...).
        sources: one, which draws the whole batch, or one per sample. As in diffusers, a list of a single one
            counts as one.

    Returns:
        float32 array of this shape.

    Raises:
        UsageError: the number of sources is not the batch size, or a seed is out of range.
    """
    if not isinstance(sources, Sequence):
        return generator(sources).randn(shape)
    if len(sources) == 1:
        return generator(sources[0]).randn(shape)
    if len(sources) != shape[0]:
        raise UsageError(f"{len(sources)} seeds for {shape[0]} images", "give one seed, or one per image")
    return np.stack([generator(source).randn(shape[1:]) for source in sources])


def randn_sample(shape: Sequence[int], source: Source, index: int) -> NDArray[np.float32]:
    """One sample of what :func:`randn_tensor` draws of one source, without transforming the others.

    Args:
        shape: (batch, ...), of the whole draw.
        source: what draws the whole batch.
        index: of the sample.

    Returns:
        float32 (1, ...).

    Raises:
        UsageError: the seed is out of range.
    """
    sample, stream = math.prod(shape[1:]), generator(source)
    if sample % BLOCK:
        return stream.randn(shape)[index : index + 1]
    stream.skip(index * sample)
    return stream.randn((1, *shape[1:]))


def generator(source: Source) -> Generator:
    """The generator of a seed; one stands for itself.

    Raises:
        UsageError: the seed is no integer, or out of range.
    """
    return source if isinstance(source, Generator) else Generator(source)
