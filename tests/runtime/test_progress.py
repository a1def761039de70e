"""The progress bar: on a terminal's stderr, and nowhere else."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from zimgkit.runtime.progress import bar, silent

WORK = """
import sys
from zimgkit.runtime.progress import bar

with bar(enabled="--quiet" not in sys.argv) as report:
    for step in range(3):
        report("encode", step, 3)
    report("encode", 3, 3)
    report("denoise", 0, 8)
    report("denoise", 5, 8)
    if "--fail" in sys.argv:
        raise KeyboardInterrupt
    report("denoise", 8, 8)
    print("out")
print("rich" in sys.modules)
"""


def on_a_terminal(*arguments: str) -> tuple[str, str]:
    """Run the work with a terminal for stderr: its stdout, and what the terminal was sent."""
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", WORK, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=follower, env=environment, text=True) as process:
        os.close(follower)
        seen = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # What a terminal gives when nobody writes to it any more.
                break
            if not piece:
                break
            seen += piece
        out, _ = process.communicate(timeout=20)
    os.close(leader)
    return out, seen.decode()


def plain(text: str) -> list[str]:
    """The lines that a terminal would show, without colours and movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").split("\n")


def test_silent_takes_any_report():
    assert silent("encode", 1, 2) is None


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_where_stderr_is_no_terminal(capsys, enabled):
    with bar(enabled=enabled) as report:
        assert report is silent
        report("encode", 0, 1)
    assert capsys.readouterr() == ("", "")


def test_nothing_where_it_is_switched_off(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with bar(enabled=False) as report:
        assert report is silent
    assert terminal.getvalue() == ""


def test_a_bar_per_stage():
    out, seen = on_a_terminal()
    assert out == "out\nTrue\n"
    lines = [line for line in plain(seen) if line.strip()]
    assert any(re.match(r"encode +\S+ +3/3 ", line) for line in lines)
    assert any(re.match(r"denoise +\S+ +8/8 ", line) for line in lines)


def test_quiet_loads_nothing():
    assert on_a_terminal("--quiet") == ("out\nFalse\n", "")


def test_the_cursor_comes_back_after_an_interruption():
    _, seen = on_a_terminal("--fail")
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1
    assert "KeyboardInterrupt" in seen


def test_a_pipe_sees_nothing(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True, timeout=20)
    assert (done.stdout, done.stderr) == ("out\nFalse\n", "")
