"""After training: a bundle with what was made, a page of pictures from it, and how often the judge finds them right.

All of it is done by other processes that do not import PyTorch to draw, as a user's will not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from zimgkit.engines.errors import ZimgError

TASKS = {"context_image": "context", "eligen_entity_prompts": "regions"}
"""Column of a dataset -> the task that a bundle has to be built for to be asked for it."""
JUDGED = {
    **dict.fromkeys(("control_image", "controlnet_image", "blockwise_controlnet_image"), "control"),
    "eligen_entity_prompts": "regions",
    "edit_image": "edit",
}
"""Likewise -> what the judge asks for."""
CONTROLNET = "trained"
"""What the ControlNet is called in the bundle."""


def build(model: str, out: Path, bundle: Path, kind: str, columns: Collection[str] = ()) -> None:
    """Build a bundle with what a run wrote.

    Args:
        model: the checkpoint that was trained on.
        out: what the run wrote.
        bundle: the new folder.
        kind: ``"checkpoint"``, ``"lora"`` or ``"controlnet"``.
        columns: of the dataset that were taken beside image and prompt.

    Raises:
        ZimgError: it cannot be built.
    """
    added = {"checkpoint": [], "lora": ["--lora", str(out)], "controlnet": ["--controlnet", f"{CONTROLNET}={out}"]}
    tasks = [TASKS[name] for name in columns if name in TASKS]
    asked = ["--tasks", ",".join(tasks)] if tasks else []
    base = str(out) if kind == "checkpoint" else model
    command = ["build", "--model", base, "--out", str(bundle), "--overwrite", "--quiet", *added[kind], *asked]
    _run("zimgkit.export", command, "the bundle could not be built")


def draw_page(bundle: Path, data: Path, page: Path, columns: Collection[str], table: Path | None = None) -> None:
    """Draw a few rows of a dataset with a bundle, each below the pictures that it gives: see :mod:`.page`.

    Raises:
        ZimgError: it cannot be drawn.
    """
    chosen = [f"--columns={','.join(columns)}"] if columns else []
    own = [f"--table={table}"] if table else []
    _run("zimgkit.training", ["page", str(bundle), str(data), str(page), *chosen, *own], "the page could not be drawn")


def judged(bundle: Path, columns: Collection[str], captions: int) -> str:
    """What the judge says of a bundle, in a line.

    Raises:
        ZimgError: it cannot judge.
    """
    task = next((JUDGED[name] for name in columns if name in JUDGED), "text-to-image")
    command = ["judge", str(bundle), "--task", task, "--captions", str(captions), "--json", "--quiet"]
    shares = json.loads(_run("zimgkit.training", command, "the judge failed"))["shares"]
    return f"judge, {task}, {captions} captions: {shares['all']:.1%}"


def _run(module: str, arguments: Sequence[str], failed: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ZimgError(f"{failed}: {said[-1] if said else 'it said nothing'}", "what was trained is kept")
    return done.stdout
