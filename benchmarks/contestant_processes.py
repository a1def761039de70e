"""Processes that stay open between their turns, as many as a limit on memory lets be."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = os.sysconf("SC_PAGE_SIZE")
SAMPLE_SECONDS = 0.1


class FailedError(Exception):
    """A contestant has no times: why."""


def tree(process: int) -> list[int]:
    """A process and all that it started, directly or not, and that run still."""
    found = [process]
    for parent in found:
        with contextlib.suppress(OSError):  # It may end meanwhile.
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
    return found


def resident(process: int) -> int:
    """Bytes that a process and all that it started have in memory, mapped files included; 0 where none can tell."""
    pages = 0
    for each in tree(process):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{each}/statm").read_text().split()[1])
    return PAGE * pages


class Contestant:
    """One process: it answers with a line of JSON when it is open, and to each line that it is sent."""

    def __init__(self, command: Sequence[str | os.PathLike[str]], log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )

    def ask(self, what: str = "draw") -> None:
        """Tell it to take its turn, in a line of text; :meth:`answer` waits for that."""
        with contextlib.suppress(BrokenPipeError):  # Its end is told as the answer.
            self._process.stdin.write(f"{what}\n".encode())  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]

    def answer(self, meanwhile: Callable[[], None]) -> dict[str, Any]:
        """Wait for its answer.

        Args:
            meanwhile: called ten times a second.

        Raises:
            FailedError: it says so, or it ended.
        """
        out = self._process.stdout
        while not select.select([out], [], [], SAMPLE_SECONDS)[0]:
            meanwhile()
        line = out.readline()  # type: ignore[union-attr]
        if not line:
            raise FailedError(self._end())
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise FailedError(answer["failed"])
        return answer

    def _end(self) -> str:
        code = self._process.wait()
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        return f"ended with {code}{f': {lines[-1][:300]}' if lines else ''}"

    def resident(self) -> int:
        """Bytes that it has in memory, with all that it started."""
        return resident(self._process.pid)

    def close(self) -> None:
        """End it, and all that it started."""
        for each in tree(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


class Contestants:
    """Contestants that take turns. Those that take the least time to open are closed where memory is short.

    Use as a context: at the end all are closed.
    """

    def __init__(self, commands: Mapping[str, Sequence[str | os.PathLike[str]]], folder: Path, limit: float) -> None:
        """Nothing is started yet.

        Args:
            commands: name -> how it is started.
            folder: of their logs.
            limit: the most bytes of memory that all may have together, mapped files included.
        """
        self._commands, self._folder, self._limit = commands, folder, limit
        self._open: dict[str, Contestant] = {}
        self._held: dict[str, int] = {}
        self._opening: dict[str, float] = {}
        self.first: dict[str, dict[str, Any]] = {}
        """Name -> what it answered when it was first open."""
        self.peaks: dict[str, int] = {}
        """Name -> the most bytes of memory that it was seen to have."""
        self.peak = 0
        """Likewise of all together."""

    def __enter__(self) -> Contestants:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._open):
            self.close(name)

    def close(self, name: str) -> None:
        """End a contestant."""
        self._held.pop(name, None)
        self._open.pop(name).close()

    def turn(self, name: str) -> dict[str, Any]:
        """Open a contestant, if it is not, and let it take a turn; what it answers.

        Raises:
            FailedError: it failed, or it takes more memory than there may be. It is closed.
        """
        try:
            if name not in self._open:
                self._make_room(name, self.peaks.get(name, 0))
                start = time.perf_counter()
                self._open[name] = Contestant(self._commands[name], self._folder / f"{name}.log")
                answer = self._open[name].answer(lambda: self._watch(name))
                self._opening[name] = time.perf_counter() - start
                self.first.setdefault(name, answer)
            self._make_room(name, self.peaks.get(name, 0))
            self._open[name].ask()
            answer = self._open[name].answer(lambda: self._watch(name))
            self._held[name] = self._open[name].resident()
            return answer
        except FailedError:
            self.close(name)
            raise

    def _watch(self, name: str) -> None:
        """See what memory a contestant takes now, and close others where that is too much.

        Raises:
            FailedError: it is too much by itself.
        """
        took = self._open[name].resident()
        self.peaks[name] = max(took, self.peaks.get(name, 0))
        self._make_room(name, took)
        if took > self._limit:
            raise FailedError(f"it takes more than {self._limit / 2**30:.3g} GiB of memory; give it more with --memory")
        self.peak = max(self.peak, took + self._held_by_others(name))

    def _make_room(self, name: str, needed: int) -> None:
        """Close others until this much is free. What they hold does not change while they wait."""
        for other in sorted(self._held, key=self._opening.__getitem__):
            if self._held_by_others(name) + needed <= self._limit:
                break
            if other != name:
                self.close(other)

    def _held_by_others(self, name: str) -> int:
        return sum(held for other, held in self._held.items() if other != name)
