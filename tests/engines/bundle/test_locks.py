"""One writer at a time, and what a killed one leaves."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from zimgkit.engines.bundle.locks import only_writer_of
from zimgkit.engines.errors import OutputError


def hold(out: Path, held: Any, let_go: Any) -> None:
    with only_writer_of(out):
        held.set()
        let_go.wait(60)


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock of ``bundle``; it lets go when the event is set."""
    context = multiprocessing.get_context("spawn")
    held, let_go = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "bundle", held, let_go))
    process.start()
    assert held.wait(60)
    yield process, let_go
    process.kill()
    process.join()


def folder(path: Path) -> Path:
    path.mkdir()
    (path / "file").write_text(path.name)
    return path


def test_another_process_holds_it(other, tmp_path, monkeypatch):
    process, let_go = other
    leftover = folder(tmp_path / ".bundle.0123abcd.part")
    with (
        pytest.raises(OutputError, match=r"another process is writing .*bundle; wait for it"),
        only_writer_of(tmp_path / "bundle"),
    ):
        pass
    assert leftover.exists()  # It is that process's work.
    # The same folder by another name; and another folder.
    (tmp_path / "link").symlink_to(tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "link", Path("bundle"), tmp_path / "." / "bundle"):
        with pytest.raises(OutputError, match="another process is writing"), only_writer_of(name):
            pass
    with only_writer_of(tmp_path / "bundle2"):
        pass
    let_go.set()
    process.join(60)
    with only_writer_of(tmp_path / "bundle"):
        assert not leftover.exists()


def test_a_killed_process_lets_go(other, tmp_path):
    process, _ = other
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    with only_writer_of(tmp_path / "bundle"):
        pass


def test_an_error_lets_go(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), only_writer_of(tmp_path / "bundle"):
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["bundle", "a", "m[12]", "a*", "b?", "x.v2", "ü (1)"])
def test_only_its_own_leftovers_go(tmp_path, name):
    """Names are names, never patterns."""
    strange = {"bundle.0123abcd.part", ".bundle2.0123abcd.part", ".bundle", ".other.0123abcd.old", ".m1.0123abcd.part"}
    others = strange | {
        f".{name}.v3.0123abcd.part",
        f".{name}.v3.0123abcd.old",
        f".{name}.notes.part",
        "bbb",
        ".ab.0123abcd.part",
    }
    own = {f".{name}.0123abcd.part", f".{name}.ab_cd3fg.float", f".{name}.ab_cd3fg.references", f".{name}.0123abcd.old"}
    for entry in {name, *others, *own}:
        folder(tmp_path / entry)
    with only_writer_of(tmp_path / name):
        assert {path.name for path in tmp_path.iterdir()} == others | {name, f".{name}.lock"}
    assert {path.name for path in tmp_path.iterdir()} == others | {name}


def test_what_was_put_aside_comes_back_where_nothing_took_its_place(tmp_path):
    folder(tmp_path / ".bundle.0000000a.old")
    with only_writer_of(tmp_path / "bundle"):
        assert (tmp_path / "bundle" / "file").read_text() == ".bundle.0000000a.old"
    folder(tmp_path / ".bundle.0000000b.old")
    with only_writer_of(tmp_path / "bundle"):
        assert (tmp_path / "bundle" / "file").read_text() == ".bundle.0000000a.old"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_another_users_cache_folder_changes_nothing(other, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with pytest.raises(OutputError, match="another process is writing"), only_writer_of(tmp_path / "bundle"):
        pass


def test_a_folder_where_no_lock_can_be_written(tmp_path, monkeypatch):
    from zimgkit.engines.bundle import locks

    acquire, asked = locks._acquire, []

    def refuse(path):
        asked.append(path)
        if path.parent == tmp_path:
            raise PermissionError(13, "read-only")
        return acquire(path)

    monkeypatch.setattr(locks, "_acquire", refuse)
    with only_writer_of(tmp_path / "bundle"):
        assert asked[0] == tmp_path / ".bundle.lock"
        assert asked[1].parent.name == "locks" and asked[1].exists()
    assert not asked[1].exists()


def test_where_no_lock_can_be_written_at_all(tmp_path, monkeypatch):
    """Reading goes on, and what is to be written says itself that it cannot be."""
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("zimgkit.engines.bundle.locks._acquire", read_only)
    with only_writer_of(tmp_path / "bundle"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def read_only(path):
    raise OSError(30, "Read-only file system")


def race(out: Path, log: Path, start: Any) -> None:
    start.wait(60)
    done = 0
    while done < 50:
        try:
            with only_writer_of(out):
                with log.open("a") as file:
                    file.write("in ")
                with log.open("a") as file:
                    file.write("out\n")
                done += 1
        except OutputError:
            pass


def test_four_processes_never_hold_it_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    start, log = context.Event(), tmp_path / "log"
    processes = [context.Process(target=race, args=(tmp_path / "bundle", log, start)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert log.read_text() == "in out\n" * 200


def test_a_folder_that_is_not_there_yet(tmp_path):
    with only_writer_of(tmp_path / "a" / "b" / "bundle"):
        pass
    assert not (tmp_path / "a").exists()
