from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from zimgkit.engines.errors import UsageError
from zimgkit.runtime import disk_cache
from zimgkit.runtime.disk_cache import cached_array

SHAPE, DTYPE = (4, 5), np.dtype("<f4")
SIZE = 4 * 5 * 4 + 128 + 4


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ZIMG_CACHE_LIMIT", raising=False)
    return tmp_path / "cache" / "zimgkit" / "things"


class Fill:
    """Fills an array with one number, and counts how often it was asked to."""

    def __init__(self, value=1.0):
        self.value = value
        self.calls = 0

    def __call__(self, array):
        self.calls += 1
        array[:] = self.value


def get(key="a", fill=None, shape=SHAPE, dtype=DTYPE):
    return cached_array("things", key, shape, dtype, fill or Fill())


def test_computes_once(folder):
    fill = Fill(3)
    for _ in range(3):
        array = get(fill=fill)
        np.testing.assert_array_equal(array, np.full(SHAPE, 3, np.float32))
        assert array.dtype == DTYPE
        assert isinstance(array, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1
    assert fill.calls == 1
    assert [path.name for path in folder.iterdir()] == ["a.npy"]
    np.testing.assert_array_equal(np.load(folder / "a.npy"), array)


def damage_byte(data):
    return data[:150] + bytes([data[150] ^ 1]) + data[151:]


@pytest.mark.parametrize(
    "damage",
    [
        damage_byte,
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: data + b"\0",
        lambda data: b"",
        lambda data: b"\0" * 4,
        lambda data: b"\0" * len(data),
        lambda data: b"x" * 1000,
    ],
)
def test_computes_damaged_entries_again(folder, damage):
    get(fill=Fill(1))
    path = folder / "a.npy"
    path.write_bytes(damage(path.read_bytes()))
    fill = Fill(2)
    for _ in range(2):
        np.testing.assert_array_equal(get(fill=fill), np.full(SHAPE, 2, np.float32))
    assert fill.calls == 1


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path), lambda path: path.symlink_to("/dev")])
def test_what_is_no_file_in_the_place_of_an_entry(folder, make):
    folder.mkdir(parents=True)
    make(folder / "a.npy")
    for value in (1, 1):
        np.testing.assert_array_equal(get(fill=Fill(value)), np.full(SHAPE, value, np.float32))
    assert get("b").shape == SHAPE and (folder / "b.npy").is_file()


def test_no_right_to_read_an_entry(monkeypatch):
    get(fill=Fill(1))
    monkeypatch.setattr(Path, "open", lambda *_: full_disk())
    np.testing.assert_array_equal(get(fill=Fill(2)), np.full(SHAPE, 2, np.float32))


def test_a_folder_among_the_entries_is_passed_over(folder, monkeypatch):
    """It can neither be removed nor keep others from being."""
    monkeypatch.setenv("ZIMG_CACHE_LIMIT", str(2 * SIZE))
    (folder / "old").mkdir(parents=True)
    os.utime(folder / "old", (0, 0))
    for key in "abc":
        get(key)
    assert (folder / "old").is_dir() and (folder / "c.npy").is_file() and not (folder / "a.npy").exists()


def test_without_a_call_that_takes_space(folder, monkeypatch):
    """Of macOS and Windows."""
    expected = get("a", Fill(3))
    monkeypatch.delattr(os, "posix_fallocate")
    np.testing.assert_array_equal(get("b", Fill(3)), expected)
    assert (folder / "b.npy").read_bytes() == (folder / "a.npy").read_bytes()


def share(start, wrong):
    """What each of several processes does: the same few entries, over and over, where not all have room."""
    start.wait(60)
    for turn in range(40):
        value = float(turn % 4)
        array = get(f"k{turn % 4}", Fill(value))
        if not np.array_equal(array, np.full(SHAPE, value, np.float32)):
            wrong.set()


def test_several_processes_share_a_cache(folder, monkeypatch):
    monkeypatch.setenv("ZIMG_CACHE_LIMIT", str(2 * SIZE))
    context = multiprocessing.get_context("fork")
    start, wrong = context.Event(), context.Event()
    processes = [context.Process(target=share, args=(start, wrong)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert not wrong.is_set()
    assert not list(folder.glob("*.part"))


def test_computes_again_for_another_shape_or_type():
    get()
    assert get(shape=(3, 5)).shape == (3, 5)
    assert get(dtype=np.dtype("<u2")).dtype == np.uint16


def test_removes_the_least_recently_used(folder, monkeypatch):
    monkeypatch.setenv("ZIMG_CACHE_LIMIT", str(3 * SIZE))
    for age, key in enumerate("abc"):
        get(key)
        os.utime(folder / f"{key}.npy", (time.time() - 100 + age,) * 2)
    get("a")
    get("d")
    assert {path.name for path in folder.iterdir()} == {"a.npy", "c.npy", "d.npy"}


def test_removes_what_a_killed_process_left(folder, monkeypatch):
    monkeypatch.setenv("ZIMG_CACHE_LIMIT", str(3 * SIZE))
    folder.mkdir(parents=True)
    (folder / "b.0123.part").write_bytes(b"x" * 2000)
    os.utime(folder / "b.0123.part", (0, 0))
    get()
    assert [path.name for path in folder.iterdir()] == ["a.npy"]


def test_a_removed_entry_stays_readable(folder):
    array = get(fill=Fill(5))
    (folder / "a.npy").unlink()
    np.testing.assert_array_equal(array, np.full(SHAPE, 5, np.float32))


@pytest.mark.parametrize("limit", ["0", "79"])
def test_too_large_for_the_limit(folder, monkeypatch, limit):
    monkeypatch.setenv("ZIMG_CACHE_LIMIT", limit)
    fill = Fill(2)
    for _ in range(2):
        array = get(fill=fill)
        np.testing.assert_array_equal(array, np.full(SHAPE, 2, np.float32))
        assert not array.flags.writeable
    assert fill.calls == 2
    assert not folder.exists()


@pytest.mark.parametrize("limit", ["", "2GiB", "-1", "1.5", "²", "9" * 5000])
def test_refuses_a_bad_limit(monkeypatch, limit):
    monkeypatch.setenv("ZIMG_CACHE_LIMIT", limit)
    with pytest.raises(UsageError, match="ZIMG_CACHE_LIMIT"):
        get()


def test_unwritable_folder(folder):
    folder.parent.parent.mkdir()
    folder.parent.write_text("a file where the folder should be")
    np.testing.assert_array_equal(get(fill=Fill(4)), np.full(SHAPE, 4, np.float32))


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_full_disk(folder, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    np.testing.assert_array_equal(get(fill=Fill(4)), np.full(SHAPE, 4, np.float32))
    assert not list(folder.iterdir())


def test_disk_that_fails_at_the_end(folder, monkeypatch):
    monkeypatch.setattr(disk_cache, "_seal", full_disk)
    np.testing.assert_array_equal(get(fill=Fill(4)), np.full(SHAPE, 4, np.float32))
    assert not list(folder.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_leaves_nothing_half_written(folder, error):
    def fill(array):
        array[:2] = 1
        raise error

    with pytest.raises(error):
        get(fill=fill)
    assert not list(folder.iterdir())
