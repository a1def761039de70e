"""Notes of which files were hashed and have not changed since."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zimgkit.engines.bundle.verified import is_known, remember, state

DIGEST = "ab" * 32


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zimgkit" / "verified"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


def note(file: Path) -> None:
    remember(file, DIGEST, state(file))


def test_a_file_is_known_by_its_hash(file):
    assert not is_known(file, DIGEST)
    note(file)
    assert is_known(file, DIGEST)
    assert not is_known(file, "cd" * 32)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"0"),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to(path)),
    ],
    ids=["empty", "cut", "longer", "nonsense", "folder", "circle"],
)
def test_a_damaged_note_counts_for_nothing(file, cache, damage):
    note(file)
    (entry,) = cache.iterdir()
    damage(entry)
    assert not is_known(file, DIGEST)
    note(file)  # It is made again where that can be.
    assert is_known(file, DIGEST) == entry.is_file()


def test_a_later_note_replaces_an_earlier(file):
    remember(file, "cd" * 32, state(file))
    note(file)
    assert is_known(file, DIGEST)
    assert not is_known(file, "cd" * 32)


def test_the_same_file_by_another_path(file, tmp_path, monkeypatch):
    note(file)
    (tmp_path / "link").symlink_to(file)
    monkeypatch.chdir(tmp_path)
    assert is_known(Path("file"), DIGEST)
    assert is_known(tmp_path / "link", DIGEST)


def test_another_file_of_the_same_content_is_not_known(file, tmp_path):
    note(file)
    (tmp_path / "copy").write_bytes(b"content")
    assert not is_known(tmp_path / "copy", DIGEST)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"longer content"),
        lambda path: os.utime(path, ns=(0, 0)),
        lambda path: (path.rename(path.with_name("other")), path.write_bytes(b"content")),
        lambda path: path.unlink(),
    ],
    ids=["size", "time", "inode", "gone"],
)
def test_a_changed_file_is_not_known(file, change):
    note(file)
    change(file)
    assert not is_known(file, DIGEST)


def test_times_that_were_set_back_do_not_help(file):
    """The time of the last change of the inode cannot be set."""
    note(file)
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        file.write_bytes(b"CONTENT")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert not is_known(file, DIGEST)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"ab" * 32])
def test_a_damaged_note_is_no_note(file, cache, content):
    note(file)
    (path,) = cache.iterdir()
    path.write_bytes(content)
    assert not is_known(file, DIGEST)
    note(file)
    assert is_known(file, DIGEST)


def test_a_cache_that_cannot_be_written_is_done_without(file, cache):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder belongs")
    note(file)
    assert not is_known(file, DIGEST)


def test_a_path_that_is_no_unicode(tmp_path):
    path = Path(os.fsdecode(bytes(tmp_path) + b"/\xff\xfe"))
    path.write_bytes(b"content")
    note(path)
    assert is_known(path, DIGEST)
