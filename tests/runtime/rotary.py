"""Comparing rotary tables."""

from __future__ import annotations

import numpy as np

GRIDS = [(1, 1), (4, 6), (6, 4), (3, 5), (64, 64), (83, 83), (58, 104), (104, 58), (1, 7)]
# One unit in the last place of an angle of this size, plus that of the cosine.
EPSILON = 2.0**-23


def assert_tables(tables, cos, sin, highest):
    """Equal, where the two pow functions may have set the angle's last bit differently."""
    assert tables.cos.dtype == tables.sin.dtype == np.float32
    assert tables.cos.shape == tuple(cos.shape)
    tolerance = EPSILON * (1 + highest)
    np.testing.assert_allclose(tables.cos, cos.numpy(), rtol=0, atol=tolerance)
    np.testing.assert_allclose(tables.sin, sin.numpy(), rtol=0, atol=tolerance)
    assert (np.abs(tables.cos - cos.numpy()) > 1.2e-7).mean() < 0.05
