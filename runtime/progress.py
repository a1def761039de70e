"""Progress of long work: a callback, and the bar on stderr that the commands pass for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total); a stage is over when done equals total."""


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@contextlib.contextmanager
def bar(*, enabled: bool = True) -> Iterator[Report]:
    """Show one bar per stage on stderr while the block runs; nothing where stderr is no terminal.

    Args:
        enabled: False shows nothing anywhere.
    """
    import sys

    if not (enabled and sys.stderr.isatty()):
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # What goes to stdout belongs there: it may be a pipe.
    progress = Progress(*columns, console=Console(stderr=True), redirect_stdout=False)
    tasks = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            # Only now: what runs before, a download for one, may show bars of its own.
            progress.start()
            tasks[stage] = progress.add_task(stage, total=total)
        progress.update(tasks[stage], completed=done, total=total)

    try:
        yield report
    finally:
        progress.stop()
