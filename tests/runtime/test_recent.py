"""What was made last is kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from zimgkit.runtime.recent import Recent


def test_what_was_asked_for_longest_ago_is_dropped():
    made = []
    recent: Recent[str, str] = Recent(2)

    def get(key):
        return recent.get(key, lambda: made.append(key) or key.upper())

    assert [get(key) for key in "abacab"] == list("ABACAB")
    assert made == ["a", "b", "c", "b"]


def test_what_fails_is_not_kept():
    recent: Recent[str, int] = Recent(2)
    with pytest.raises(ZeroDivisionError):
        recent.get("a", lambda: 1 // 0)
    assert recent.get("a", lambda: 3) == 3


def test_threads():
    recent: Recent[int, int] = Recent(4)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: recent.get(n % 7, lambda: (n % 7) ** 2), range(2000)))
    assert found == [(n % 7) ** 2 for n in range(2000)]
