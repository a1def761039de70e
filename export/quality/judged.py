"""The judge of the demo models' pictures. It lives above this package, which finds it by its entry point."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from zimgkit.engines.errors import ZimgError
from zimgkit.runtime.progress import Report, silent

GROUP = "zimgkit.judges"
"""The group of entry points that judges are found in."""
CAPTIONS = 200

Judge = Callable[..., dict[str, float]]
"""From a bundle's folder, how many captions it is asked, what runs it, a report of progress, and parameters of the
pipeline by name, to how many things a caption tells of, ``"one"`` or ``"two"`` -> the share of pictures that show them.
"""


def accuracy(bundle: Path, captions: int, backend: str, report: Report = silent, **call: Any) -> dict[str, float]:
    """How often a bundle draws what it is asked for, see :data:`Judge`.

    Args:
        bundle: its folder.
        captions: how many pictures it draws.
        backend: what runs it.
        report: called with (stage, done, total).
        call: parameters of the pipeline that are not the bundle's own.

    Raises:
        ZimgError: no judge is installed, or it or the bundle failed.
    """
    found = entry_points(group=GROUP)
    if not found:
        raise ZimgError("no judge of pictures is installed", "leave it out with --judge 0")
    judge: Judge = next(iter(found)).load()
    try:
        return judge(bundle, captions, backend, report, **call)
    except ZimgError as error:
        raise ZimgError(f"the judge failed: {error.message}", "leave it out with --judge 0") from None
