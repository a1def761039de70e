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


def test_only_its_own_leftovers_go(tmp_path):
    others = {"bundle", ".bundle2.1.part", ".bundle", "bundle.1.part", ".other.1.old"}
    for name in (*others, ".bundle.1.part", ".bundle.2.part"):
        folder(tmp_path / name)
    with only_writer_of(tmp_path / "bundle"):
        assert {path.name for path in tmp_path.iterdir()} == others


def test_what_was_put_aside_comes_back_where_nothing_took_its_place(tmp_path):
    folder(tmp_path / ".bundle.1.old")
    with only_writer_of(tmp_path / "bundle"):
        assert (tmp_path / "bundle" / "file").read_text() == ".bundle.1.old"
    folder(tmp_path / ".bundle.2.old")
    with only_writer_of(tmp_path / "bundle"):
        assert (tmp_path / "bundle" / "file").read_text() == ".bundle.1.old"
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_is_not_there_yet(tmp_path):
    with only_writer_of(tmp_path / "a" / "b" / "bundle"):
        assert not (tmp_path / "a").exists()
