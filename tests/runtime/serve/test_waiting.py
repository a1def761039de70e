"""The queue alone: turns, bounds, and what is taken out."""

from __future__ import annotations

import random
import threading

import pytest

from zimgkit.runtime.serve.drawing import Drawing
from zimgkit.runtime.serve.errors import ApiError
from zimgkit.runtime.serve.waiting import Waiting


def drawing(client: str = "a", seconds: float = 0.0) -> Drawing:
    return Drawing(None, None, client, lambda event: None, seconds=seconds)  # type: ignore[arg-type]


def test_bounds():
    waiting = Waiting(10)
    with pytest.raises(ApiError, match="this takes about 60 seconds, and 10 is the most here") as error:
        waiting.put(drawing(seconds=60))
    assert error.value.status == 400, "it would take as long at the next try"
    waiting.put(drawing(seconds=9))
    with pytest.raises(ApiError, match="9 seconds of work") as error:
        waiting.put(drawing(seconds=2))
    assert (error.value.status, error.value.retry_after) == (429, 1)
    waiting.put(drawing(seconds=1))


def test_seconds_are_those_of_what_waits():
    waiting = Waiting(100)
    put = [drawing(random.choice("abc"), random.random()) for _ in range(50)]
    for one in put:
        waiting.put(one)
    assert waiting.seconds == pytest.approx(sum(one.seconds for one in put))
    for one in put[::2]:
        assert waiting.remove(one)
        assert not waiting.remove(one)
    assert waiting.seconds == pytest.approx(sum(one.seconds for one in put[1::2]))
    expected = waiting.order()
    assert [waiting.take() for _ in range(len(waiting))] == expected
    assert waiting.seconds == 0


def test_no_client_waits_for_more_than_one_of_each_other():
    rng = random.Random(1)
    for _ in range(50):
        waiting, clients = Waiting(1e9), "abcde"[: rng.randint(1, 5)]
        for _ in range(rng.randint(1, 40)):
            waiting.put(drawing(rng.choice(clients)))
        taken = [one.client for one in (waiting.take() for _ in range(len(waiting))) if one]
        for client in set(taken):
            places = [place for place, one in enumerate(taken) if one == client]
            for first, second in zip([-1, *places], places, strict=False):
                between = taken[first + 1 : second]
                assert len(between) == len(set(between)), "each other client at most once between two of one"


def test_threads_take_each_once():
    waiting, taken, lock = Waiting(1e9), [], threading.Lock()

    def take() -> None:
        while (one := waiting.take()) is not None:
            with lock:
                taken.append(one)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    put = [drawing(str(number % 7)) for number in range(500)]
    for one in put:
        waiting.put(one)
    waiting.close()
    for thread in threads:
        thread.join(10)
    assert sorted(one.number for one in taken) == sorted(one.number for one in put)
    with pytest.raises(ApiError, match="shutting down"):
        waiting.put(drawing())
