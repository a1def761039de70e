"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import multiprocessing

import numpy as np
import pytest
from safetensors.numpy import save_file

from zimgkit.engines import files
from zimgkit.engines.files import beside, replacing, temporary_folder


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.parent == tmp_path and part.name.startswith(".f.txt.")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_who_may_read_a_file_does_not_depend_on_what_wrote_it(tmp_path):
    """The library of safetensors puts a file that its owner alone may read in the place of the one it is given."""
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "a") as part:
        save_file({"x": np.zeros(3, np.float32)}, part)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_nothing_half_written_stays(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(OSError, match="directory"), replacing(tmp_path / "d") as part:
        part.write_text("new")
    assert list(tmp_path.iterdir()) == [tmp_path / "d"]


def keep_a_part(path, made, stop):
    with replacing(path) as part, temporary_folder(path, "references") as folder:
        part.write_text("half")
        (folder / "file").touch()
        made.set()
        stop.wait(60)


@pytest.fixture
def other(tmp_path):
    """A process that is writing ``f.txt`` and has a folder beside it."""
    context = multiprocessing.get_context("fork")
    made, stop = context.Event(), context.Event()
    process = context.Process(target=keep_a_part, args=(tmp_path / "f.txt", made, stop))
    process.start()
    assert made.wait(60)
    yield process
    process.kill()
    process.join()


def write(path):
    with replacing(path) as part:
        part.write_text("new")
    with temporary_folder(path, "references") as folder:
        (folder / "file").touch()


def test_what_a_killed_process_left_is_removed(other, tmp_path):
    assert len(list(tmp_path.iterdir())) == 2
    write(tmp_path / "f.txt")
    assert len(list(tmp_path.iterdir())) == 3  # It lives, so both are its own.
    other.kill()
    other.join()
    write(tmp_path / "g.txt")
    assert len(list(tmp_path.iterdir())) == 4  # They are of another file.
    write(tmp_path / "f.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.txt", "g.txt"]


def test_only_what_is_named_so_is_removed(tmp_path):
    mine = {
        ".f.txt.part",
        ".f.txt.0123456.part",
        ".fxtxt.01234567.part",
        ".f.txt.01234567.part.txt",
        "f.txt.01234567.part",
    }
    for name in mine:
        (tmp_path / name).touch()
    (tmp_path / ".f.txt.00000001.part").symlink_to("/etc/hostname")
    (tmp_path / ".f.txt.01234567.part").touch()
    write(tmp_path / "f.txt")
    assert {path.name for path in tmp_path.iterdir()} == mine | {"f.txt", ".f.txt.00000001.part"}


def write_often(path, text):
    for _ in range(60):
        with replacing(path) as part:
            part.write_text(text * 1000)


def test_several_writers_at_once(tmp_path):
    """Each file is whole, and none takes another's for a dead one's."""
    context = multiprocessing.get_context("fork")
    path = tmp_path / "f.txt"
    processes = [context.Process(target=write_often, args=(path, text)) for text in "abcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert path.read_text() in {text * 1000 for text in "abcd"} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), OSError(errno.EBADF, "Bad file")])
def test_a_file_system_without_locks(tmp_path, monkeypatch, error):
    """What others left stays there; writing works."""

    def refuse(*_):
        raise error

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    (tmp_path / ".f.txt.01234567.part").touch()
    write(tmp_path / "f.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".f.txt.01234567.part", "f.txt"]


def test_a_system_without_locks(tmp_path, monkeypatch):
    """Windows."""
    monkeypatch.setattr(files, "fcntl", None)
    write(tmp_path / "f.txt")
    assert (tmp_path / "f.txt").read_text() == "new"


def test_names_beside_differ(tmp_path):
    names = {beside(tmp_path / "x", "old") for _ in range(100)}
    assert len(names) == 100 and all(name.parent == tmp_path and name.suffix == ".old" for name in names)
