"""What a request is likely to take, from what those before it took."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from zimgkit.runtime.serve.rates import NEWEST, Rates


def request(batch: int = 1, side: int = 1000, frames: int = 1) -> Any:
    return SimpleNamespace(batch=batch, height=side, width=side, frames=frames)


def test_nothing_is_known_of_a_model_before_its_first_picture():
    rates = Rates()
    rates.measured("other", request(), 10, 5.0, 1.0)
    rates.measured("model", request(), 0, 5.0, 1.0)
    assert rates.seconds("model", request(), 10) == 0


def test_seconds_follow_runs_pictures_and_size():
    rates = Rates()
    rates.measured("model", request(batch=2), 40, denoising=80.0, rest=6.0)  # 1 s a run, 3 s a picture.
    assert rates.seconds("model", request(), 40) == pytest.approx(43)
    assert rates.seconds("model", request(), 22.5) == pytest.approx(25.5), "guidance or a cache leaves runs out"
    assert rates.seconds("model", request(batch=3, side=2000, frames=2), 10) == pytest.approx(3 * 4 * 2 * 13)


def test_the_newest_counts_for_its_share():
    rates = Rates()
    rates.measured("model", request(), 10, denoising=10.0, rest=1.0)
    rates.measured("model", request(), 5, denoising=10.0, rest=3.0)
    assert rates.seconds("model", request(), 1) == pytest.approx(2 + NEWEST * (1 + 2))
