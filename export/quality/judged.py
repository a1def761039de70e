"""The judge of the demo models' pictures, who lives above this package: it is asked in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from zimgkit.engines.errors import ZimgError
from zimgkit.runtime.progress import Report, silent

KNOWN = "zimg-tiny-"
"""How the names of the checkpoints begin whose pictures it understands."""
CAPTIONS = 200


def is_known(name: str) -> bool:
    """Whether a checkpoint of this name draws what the judge understands."""
    return name.startswith(KNOWN)


def accuracy(bundle: Path, captions: int, backend: str, report: Report = silent) -> dict[str, float]:
    """How often a bundle draws what it is asked for.

    Args:
        bundle: its folder.
        captions: how many it is asked.
        backend: what runs it.
        report: called with (stage, done, total).

    Returns:
        How many things a caption tells of, ``"one"`` or ``"two"`` -> the share that is right.

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
