"""Masks of full steps against tables written by hand, and what is no mask."""

from __future__ import annotations

import numpy as np
import pytest

from zimgkit.engines.bundle import CacheMask
from zimgkit.engines.errors import UsageError
from zimgkit.runtime.diffusion.caching import PATTERNS, caching, change, pattern, resampled, weights

BALANCED = {
    13: "1111111100101",
    20: "11111111001001001001",
    28: "1111111100100100100100100101",
    30: "111111110010010010010010010011",
    50: "11111111001001001001001001001001001001001001001001",
}
FAST = {
    13: "1111000100011",
    20: "11110001000100010001",
    28: "1111000100010001000100010001",
    30: "111100010001000100010001000101",
    50: "11110001000100010001000100010001000100010001000101",
}


def digits(mask):
    return "".join("01"[full] for full in mask)


@pytest.mark.parametrize(("name", "table"), [("balanced", BALANCED), ("fast", FAST)])
def test_the_masks(name, table):
    for steps, wanted in table.items():
        found = caching(name, steps)
        assert (digits(found.positive), digits(found.negative)) == (wanted, wanted)
        assert (found.order, found.threshold, found.notes) == (1, None, ())
    assert [sum(caching(name, 50).positive) for name in ("balanced", "fast")] == [22, 16]


def test_every_number_of_steps():
    for steps in range(13, 1001):
        for first, one_of in ((8, 3), (4, 4)):
            mask = pattern(first, one_of, steps)
            assert len(mask) == steps and all(mask[:first]) and mask[-1]
            assert "1" not in {digits(mask)[i : i + one_of - 1] for i in range(first, steps - one_of, one_of)}


@pytest.mark.parametrize("name", ["balanced", "fast", "dynamic", "dynamic:0.3"])
def test_few_steps(name):
    for steps in (1, 2, 9, 12):
        found = caching(name, steps)
        assert not found.saves and f"{steps} steps are too few" in found.notes[0]
    assert caching(name, 13).saves and not caching(name, 13).notes


def test_off():
    assert caching("off", 50) is None and caching("1" * 20, 20) is None and caching("off", 50, {}, "off", 1) is None


def test_a_mask_of_digits():
    found = caching("111101001", 9, order=0)
    assert digits(found.positive) == digits(found.negative) == "111101001" and found.order == 0


def test_a_mask_of_the_negative_branch():
    found = caching("off", 20, negative="fast")
    assert all(found.positive) and digits(found.negative) == FAST[20]
    found = caching("fast", 20, negative="off")
    assert digits(found.positive) == FAST[20] and all(found.negative)


def test_dynamic():
    found = caching("dynamic", 20)
    assert (digits(found.positive), found.threshold) == ("11110000000000000001", 0.12)
    assert caching("dynamic:0.3", 20).threshold == 0.3


def test_masks_of_the_bundle():
    own = {
        "quick": CacheMask("1" * 10 + "10" * 20, order=0),
        "both": CacheMask("1" * 20, "10" * 10),
        "balanced": CacheMask("1" + "0" * 18 + "1"),
    }
    found = caching("quick", 50, own)
    assert digits(found.positive) == own["quick"].steps and (found.order, found.notes) == (0, ())
    assert caching("quick", 50, own, order=1).order == 1
    assert digits(caching("both", 20, own).negative) == "10" * 10
    assert digits(caching("off", 20, own, "both").negative) == "10" * 10
    assert digits(caching("balanced", 20, own).positive) == own["balanced"].steps
    found = caching("quick", 30, own)
    assert "is of 50 steps, and is stretched to 30" in found.notes[0] and len(found.positive) == 30
    assert not caching("quick", 12, own).saves
    assert caching("few", 4, {"few": CacheMask("1001")}).saves


@pytest.mark.parametrize("steps", [13, 25, 28, 49, 51, 100, 777])
@pytest.mark.parametrize("mask", [pattern(8, 3, 50), pattern(4, 4, 50), (True,) * 50])
def test_stretched(mask, steps):
    """Every part of the schedule has its share of full steps, to one step."""
    found = resampled(mask, steps)
    assert len(found) == steps and found[0] and found[-1]
    for index in range(steps + 1):
        place = index * 50 / steps
        wanted = np.interp(place, range(51), np.cumsum([0, *mask])) * steps / 50
        assert abs(sum(found[:index]) - wanted) <= 1.5
    assert resampled(mask, 50) == mask


@pytest.mark.parametrize(
    ("cache", "told"),
    [
        ("011", "cache leaves out the first step; begin it with 1"),
        ("11", "cache is a mask of 2 steps, and 3 are taken; give a digit for each"),
        ("1" * 4, "cache is a mask of 4 steps, and 3 are taken"),
        ("1a1", "cache is '1a1'; choose off, balanced, fast, dynamic, or a 1 or a 0 for each step"),
        ("", "cache is ''; choose"),
        ("Balanced", "cache is 'Balanced'; choose"),
        ("1\u0661", "choose off"),
        ("dynamic:", "cache is 'dynamic:'; give a threshold above 0 and below 1, such as 0.12"),
        ("dynamic:0", "give a threshold"),
        ("dynamic:1", "give a threshold"),
        ("dynamic:-0.5", "give a threshold"),
        ("dynamic:nan", "give a threshold"),
        ("dynamic:much", "give a threshold"),
        ("x" * 10_000, "choose off"),
    ],
)
def test_what_is_no_mask(cache, told):
    with pytest.raises(UsageError) as caught:
        caching(cache, 3)
    assert told in str(caught.value) and len(str(caught.value)) < 200
    if not cache.startswith("dynamic"):
        with pytest.raises(UsageError, match="cache_negative"):
            caching("off", 3, negative=cache)


def test_dynamic_decides_for_both():
    for cache, negative in (("dynamic", "off"), ("dynamic:0.2", "fast")):
        with pytest.raises(UsageError, match="dynamic decides for both branches"):
            caching(cache, 50, negative=negative)
    with pytest.raises(UsageError, match="cache_negative is 'dynamic'"):
        caching("fast", 50, negative="dynamic")


def test_weights():
    assert weights(5, 5, 4, 1) == weights(7, 5, 4, 0) == weights(7, 5, None, 1) == (1.0, 0.0)
    assert weights(7, 5, 4, 1) == (3.0, -2.0) and weights(9, 7, 4, 1) == (1 + 2 / 3, -2 / 3)


def test_change():
    last = np.array([[1.0, -1.0, 2.0]], np.float32)
    assert change(last, last) == 0 and change(last * 1.5, last) == 0.5
    assert change(last, last * 0) == float("inf")


def test_a_pattern_in_the_bundle_is_the_pattern_of_any_number_of_steps():
    steps = "".join("01"[full] for full in pattern(*PATTERNS["fast"], 20))
    found = caching("fast", 33, {"fast": CacheMask(steps, order=0)})
    assert (found.positive, found.order, found.notes) == (pattern(*PATTERNS["fast"], 33), 0, ())
