"""The best mask against all masks that there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from zimgkit.export.quality import step_masks
from zimgkit.export.quality.step_masks import best_mask, fewest, pairs


def random_errors(steps, order, seed=0):
    rng = np.random.default_rng(seed)
    return {(pair, step): float(rng.uniform()) for step in range(1, steps) for pair in pairs(step, order)}


def paid(mask, errors, order):
    """What a mask costs, step by step; None where more are left out in a row than may be."""
    total, full = 0.0, [0]
    for step, digit in enumerate(mask[1:], start=1):
        if digit == "1":
            full.append(step)
        elif step - full[-1] > step_masks.LONGEST:
            return None
        else:
            older = full[-2] if order and len(full) > 1 else None
            total += errors[(full[-1], older), step]
    return total


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(("steps", "full"), [(3, 2), (9, 2), (9, 4), (10, 9), (4, 4)])
@pytest.mark.parametrize("longest", [7, 2])
def test_no_mask_is_better(order, steps, full, longest, monkeypatch):
    monkeypatch.setattr(step_masks, "LONGEST", longest)
    full = max(full, fewest(steps))
    errors = random_errors(steps, order)
    every = ("".join(digits) for digits in itertools.product("01", repeat=steps - 2))
    masks = [f"1{middle}1" for middle in every if middle.count("1") == full - 2]
    costs = {mask: cost for mask in masks if (cost := paid(mask, errors, order)) is not None}
    mask, total = best_mask(errors, steps, full, order)
    assert mask == min(costs, key=costs.__getitem__)
    assert total == pytest.approx(costs[mask])


@pytest.mark.parametrize(("steps", "least"), [(2, 2), (3, 2), (9, 2), (10, 3), (17, 3), (18, 4), (50, 8)])
def test_fewest_is_what_a_mask_can_have(steps, least):
    assert fewest(steps) == least
    mask, _ = best_mask(random_errors(steps, 1), steps, least, 1)
    assert mask.count("1") == least
    assert "0" * (step_masks.LONGEST + 1) not in mask


def test_long_schedules_take_little_time():
    mask, _ = best_mask(random_errors(60, 1), 60, 30, 1)
    assert (len(mask), mask.count("1")) == (60, 30)
