"""``zimg-run sheet``: a page of pictures, one cell for each prompt; in a cell, one picture of each bundle.

The same seed goes to every picture, so what differs within a cell is the bundles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimgkit.engines.errors import UsageError
from zimgkit.runtime import demo_models
from zimgkit.runtime.commands.memory import told
from zimgkit.runtime.pictures.saving import check_target, save
from zimgkit.runtime.pictures.sheet import compose
from zimgkit.runtime.pipeline import Pipeline
from zimgkit.runtime.progress import Report, silent
from zimgkit.runtime.text.prompts import read_prompts

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PROMPTS = 1000


def prompts_of(path: Path) -> list[str]:
    """The prompts of a page, from a text file.

    Raises:
        UsageError: there is no such file, it is no text in UTF-8, or holds no prompts or too many.
    """
    prompts = read_prompts(path)
    if not 0 < len(prompts) <= MOST_PROMPTS:
        raise UsageError(f"{path} holds {len(prompts)} prompts", f"give 1 to {MOST_PROMPTS}, one a line")
    return prompts


def draw_sheet(
    prompts: Sequence[str],
    output: Path,
    call: Mapping[str, Any],
    *,
    bundles: Sequence[Path],
    columns: int = 4,
    backend: str = "onnxruntime",
    device: str | None = None,
    memory: str = "auto",
    vae_tiling: str = "auto",
    report: Report = silent,
    warn: Callable[[str], None] = lambda message: None,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Draw every prompt with every bundle, and save all pictures as one.

    Args:
        prompts: one for each cell.
        output: the file.
        call: parameters of :meth:`Pipeline.__call__` by name, None where one was not given.
        bundles: folders, or names of bundles that zimgkit carries.
        columns: cells side by side.
        backend: as for :meth:`Pipeline.open`.
        device: as for :meth:`Pipeline.open`.
        memory: as for :meth:`Pipeline.open`.
        vae_tiling: as for :meth:`Pipeline.open`.
        report: called with (stage, done, total).
        warn: called with what the user should know.
        say: called with how the pictures fit the memory, where that is worth a line.

    Returns:
        ``path``, ``width``, ``height``, and for each bundle its name, how it fits memory, and the seconds it took.

    Raises:
        ZimgError: whatever went wrong, in one line; no sheet is half-written.
    """
    if columns < 1:
        raise UsageError(f"columns is {columns}", "give 1 or more")
    check_target(output)
    given = {name: value for name, value in call.items() if value is not None}
    rows: list[list[Image]] = []
    made = []
    for bundle in bundles:
        started = time.perf_counter()
        with Pipeline.open(
            demo_models.locate(bundle), backend=backend, device=device, memory=memory, vae_tiling=vae_tiling, warn=warn
        ) as pipeline:
            manifest = pipeline.bundle.manifest
            wanted = {"negative_prompt": manifest.defaults.negative_prompt} | given
            plan = told(pipeline, pipeline.plan(max(prompts, key=len), **wanted), say)
            row = []
            for number, prompt in enumerate(prompts):
                report(manifest.name, number, len(prompts))
                row += pipeline(prompt, **wanted).images
            report(manifest.name, len(prompts), len(prompts))
        rows.append(row)
        made.append({"name": manifest.name, "memory": plan, "seconds": round(time.perf_counter() - started, 3)})
    page = compose(prompts, list(zip(*rows, strict=True)), columns)
    save(page, output)
    return {"path": str(output), "width": page.width, "height": page.height, "bundles": made}
