"""Judge the pictures of the demo models, in a process of its own: the judge belongs to ``zimgkit.training``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from zimgkit.engines.errors import ZimgError
from zimgkit.runtime.progress import Report, silent

CAPTIONS = 200
"""How many captions the judge draws and looks at by default."""


def accuracy(bundle: Path, captions: int, backend: str, report: Report = silent) -> dict[str, float]:
    """Measure how often a bundle draws what a caption asks for.

    Args:
        bundle: its folder.
        captions: how many pictures it draws.
        backend: what runs it.
        report: called with (stage, done, total).

    Returns:
        The number of things in a caption, ``"one"`` or ``"two"`` -> the share of pictures that show them, 0 to 1.

    Raises:
        ZimgError: the judge or the bundle failed.
    """
    report("judge", 0, 1)
    command = [sys.executable, "-m", "zimgkit.training", "judge", str(bundle), "--captions", str(captions)]
    done = subprocess.run(
        [*command, "--backend", backend, "--json", "--quiet"], capture_output=True, text=True, check=False
    )
    report("judge", 1, 1)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise ZimgError(f"the judge failed: {said}", "leave it out with --judge 0")
    shares: dict[str, float] = json.loads(done.stdout)["shares"]
    return shares
