"""Pictures by address are kept for a while, within bounds."""

from __future__ import annotations

from zimgkit.runtime.serve import store as stores


def test_what_is_kept_is_given():
    store = stores.Store()
    names = [store.put(bytes([n]), "image/png") for n in range(100)]
    assert len(set(names)) == 100
    assert all(len(name) >= 32 for name in names)
    assert [store.get(name).data for name in names] == [bytes([n]) for n in range(100)]
    assert store.get("other") is None


def test_the_oldest_make_room():
    store = stores.Store(most_bytes=10)
    first, second, third = (store.put(b"x" * 4, "image/png") for _ in range(3))
    assert store.get(first) is None
    assert store.get(second)
    assert store.get(third)
    large = store.put(b"x" * 40, "image/png")
    assert store.get(large)
    assert store.get(third) is None


def test_time_runs_out(monkeypatch):
    now = 100.0
    monkeypatch.setattr(stores.time, "monotonic", lambda: now)
    store = stores.Store(seconds=5)
    name = store.put(b"x", "image/png")
    now = 104.9
    assert store.get(name)
    now = 105.1
    assert store.get(name) is None
    store.put(b"y", "image/png")
    assert store._bytes == 1, "what is too old is dropped"
