"""A time as 256 cosines and sines (Vaswani et al. 2017), which the networks take it as.

Frequencies are 10000^(-i/128). In which order a family multiplies, its own file says. The angles go up to 1000, where
the last bit of a float32 is 6e-5, so every rounding is the reference's; it is done here rather than in a graph, where
each backend would round in its own way.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FREQUENCIES = 128
MAX_PERIOD = 10000
ROUNDED_UP = [12, 106]
"""Torch's float32 ``exp`` misses the nearest float32 for these two frequencies, by a fiftieth of their last place.

At the highest timestep that still turns frequency 12 by 3e-5, so the tables follow torch.
"""


def frequencies() -> NDArray[np.float32]:
    """10000^(-i/128) for i = 0 ... 127, float32 (128,), as torch computes them."""
    exponent = np.float32(-math.log(MAX_PERIOD)) * np.arange(FREQUENCIES, dtype=np.float32) / np.float32(FREQUENCIES)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    frequency[ROUNDED_UP] = np.nextafter(frequency[ROUNDED_UP], np.float32(1))
    return frequency


def sinusoids(angles: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosines, then sines, of angles float32 (N, 128): float32 (N, 256)."""
    wide = angles.astype(np.float64)
    return np.concatenate([np.cos(wide), np.sin(wide)], axis=1).astype(np.float32)
