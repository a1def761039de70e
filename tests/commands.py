"""Run a command as its console script would, in this process."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock


@dataclass(frozen=True)
class Result:
    """What a command left."""

    code: int
    out: str
    err: str

    def assert_refused(self, message: str, code: int) -> None:
        """Exactly one line on stderr, which holds ``message``; nothing on stdout; the right exit code."""
        assert self.code == code, self
        assert self.out == "", self
        assert message in self.err, self
        assert self.err.endswith("\n"), self
        assert self.err.count("\n") == 1, self
        assert "internal error" not in self.err, self


def invoke(main: Callable[[], None], *arguments: object) -> Result:
    """Call a console script's function with arguments; they are turned into text."""
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    argv = ["command", *(str(argument) for argument in arguments)]
    try:
        with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        return Result(int(stop.code or 0), out.getvalue(), err.getvalue())
    finally:
        signal.signal(signal.SIGTERM, handler)
    raise AssertionError("a console script ends with SystemExit")


def heed_interrupts() -> None:
    """In a child process before it starts: what runs in the background has been told to ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
