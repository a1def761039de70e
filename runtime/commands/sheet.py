"""``zimg-run sheet``: a page of pictures, one cell for each prompt; in a cell, the pictures of each bundle.

The same seed goes to every picture, so what differs within a cell is the bundles. A picture that they are drawn from,
and its mask, come first; so does one that controls.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimgkit.engines.choice import AUTO
from zimgkit.engines.errors import UsageError
from zimgkit.runtime import demo_models
from zimgkit.runtime.commands.generate import completed, filled, keeping, warn_of_others
from zimgkit.runtime.commands.memory import told
from zimgkit.runtime.parameters import BY_NAME, checked
from zimgkit.runtime.pictures.metadata import read
from zimgkit.runtime.pictures.reading import flattened
from zimgkit.runtime.pictures.saving import check_target, save
from zimgkit.runtime.pictures.sheet import compose, numbered
from zimgkit.runtime.pipeline import Output, Pipeline
from zimgkit.runtime.progress import Report, silent
from zimgkit.runtime.text.prompts import read_prompts, read_text

if TYPE_CHECKING:
    from PIL.Image import Image

MOST = 1000
"""Prompts of a page, and pictures of a bundle on it."""
SEED = 0
"""Without another one: pages are compared."""
TABLE = ".csv"
PICTURES = ("image", "mask_image", "control_image", "eligen_entity_masks")
"""Columns of a table that name files, several in a list in JSON."""
TEXTS = ("eligen_entity_prompts",)
"""Other columns, likewise, beside ``prompt``."""
SEVERAL = ("eligen_entity_masks", *TEXTS)
"""Those that are always lists to a call."""


def prompts_of(path: Path) -> list[str]:
    """The prompts of a page, from a text file.

    Raises:
        UsageError: there is no such file, it is no text in UTF-8, or holds no prompts or too many.
    """
    prompts = read_prompts(path)
    if not 0 < len(prompts) <= MOST:
        raise UsageError(f"{path} holds {len(prompts)} prompts", f"give 1 to {MOST}, one a line")
    return prompts


def rows_of(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The prompts of a page, and what each is drawn from, if anything.

    Args:
        path: a text file with one prompt a line, or a table that ends in ``.csv``, with a column ``prompt`` and any of
            :data:`PICTURES` and :data:`TEXTS`, files named from where the table lies.

    Returns:
        The prompts, and for each the parameters of a call that its row gives; of a list, a list.

    Raises:
        UsageError: as for :func:`prompts_of`; or columns are missing or unknown, a row has no prompt, or what should be
            a list is none.
    """
    if path.suffix.lower() != TABLE:
        prompts = prompts_of(path)
        return prompts, [{} for _ in prompts]
    reader = csv.DictReader(io.StringIO(read_text(path, "name a table in UTF-8"), newline=""), restval="")
    try:
        columns, rows = reader.fieldnames or (), [*reader]
    except csv.Error as error:
        raise UsageError(f"{path} cannot be read ({error})", "name a table of comma-separated values") from None
    known = ("prompt", *PICTURES, *TEXTS)
    if "prompt" not in columns or (set(columns) - {*known}):
        raise UsageError(f"{path} has the columns {', '.join(columns)}", f"name them {', '.join(known)}")
    if not 0 < len(rows) <= MOST:
        raise UsageError(f"{path} holds {len(rows)} prompts", f"give 1 to {MOST}, one a line")
    for number, row in enumerate(rows, start=1):
        if None in row or not row["prompt"].strip():
            raise UsageError(f"row {number} of {path} has no prompt, or too many columns", "quote prompts with commas")
    inputs = [
        {name: _cell(path, number, name, row[name].strip()) for name in known[1:] if row.get(name)}
        for number, row in enumerate(rows, start=1)
    ]
    return [row["prompt"].strip() for row in rows], inputs


def _cell(path: Path, number: int, name: str, text: str) -> Any:
    """What a cell of a table gives: a text or a file, or a list of such, as tables of datasets have them."""
    values = [text]
    if is_list := text.startswith("["):
        try:
            values = json.loads(text)
        except ValueError:
            values = []
        if not values or not all(isinstance(value, str) for value in values):
            raise UsageError(f"{name} of row {number} of {path} is no list of texts", 'write ["one", "two"]')
    found = [path.parent / value for value in values] if name in PICTURES else values
    return found if is_list or name in SEVERAL else found[0]


def draw_sheet(
    prompts: Sequence[str],
    output: Path,
    call: Mapping[str, Any],
    *,
    bundles: Sequence[Path],
    inputs: Sequence[Mapping[str, Any]] = (),
    from_image: Path | None = None,
    columns: int = 4,
    backend: str = AUTO,
    device: str | None = None,
    memory: str = "auto",
    vae_tiling: str = "auto",
    report: Report = silent,
    warn: Callable[[str], None] = lambda message: None,
    note: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Draw every prompt with every bundle, and save all pictures as one.

    Args:
        prompts: one for each cell; none for that of ``from_image``.
        output: the file.
        call: parameters of :meth:`Pipeline.__call__` by name, None where one was not given.
        bundles: folders, or names of bundles that zimgkit carries.
        inputs: for each prompt what it is drawn from, by the names of parameters.
        from_image: a picture whose parameters fill in what is not given.
        columns: cells side by side.
        backend: as for :meth:`Pipeline.open`.
        device: as for :meth:`Pipeline.open`.
        memory: as for :meth:`Pipeline.open`.
        vae_tiling: as for :meth:`Pipeline.open`.
        report: called with (stage, done, total).
        warn: called with what the user should know.
        note: called with what is worth a line: the backend that was chosen, and how the pictures fit the memory.

    Returns:
        ``path``, ``width``, ``height``, for each of ``bundles`` its name, backend, how it fits the memory and the
        seconds its pictures took, and as ``numbered`` the prompts that no font here can show, by what stands there.

    Raises:
        ZimgError: whatever went wrong, in one line; no sheet is half-written.
    """
    if columns < 1:
        raise UsageError(f"columns is {columns}", "give 1 or more")
    given = {name: value for name, value in call.items() if value is not None}
    count = checked(BY_NAME["num_images_per_prompt"], given.pop("num_images_per_prompt", 1))
    template = read(from_image, warn) if from_image else None
    if template and from_image:
        given = filled(given, template, from_image, warn)
        prompts = prompts or [text for text in [given["prompt"]] if text]
    given.pop("prompt", None)
    given.setdefault("seed", SEED)
    if not prompts:
        raise UsageError("there is nothing to draw", "name a file of prompts, or give --from-image PICTURE")
    if len(prompts) * count > MOST:
        raise UsageError(f"a page of {len(prompts)} prompts, {count} pictures each", f"draw at most {MOST} pictures")
    check_target(output)
    # What is given for the whole page goes to every row.
    calls = [keeping({**given, **own}) for own in inputs or [{}] * len(prompts)]
    before: list[list[Image]] = []
    rows: list[list[list[Image]]] = []
    made = []
    for bundle in bundles:
        started = time.perf_counter()
        with Pipeline.open(
            demo_models.locate(bundle), backend=backend, device=device, memory=memory, vae_tiling=vae_tiling, warn=warn
        ) as pipeline:
            manifest = pipeline.bundle.manifest
            more = completed(pipeline, {"prompt": prompts[0], **calls[0]}, template, count)
            if template:
                warn_of_others(template, f"{from_image}", manifest, warn)
            longest = max(range(len(prompts)), key=lambda number: len(prompts[number]))
            wanted = {"prompt": prompts[longest], **calls[longest], **more, "num_images_per_prompt": count}
            plan = told(pipeline, pipeline.plan(**wanted), note, f"{manifest.name} by ")
            choice = pipeline.session.choice
            row = []
            for number, (prompt, own) in enumerate(zip(prompts, calls, strict=True)):
                report(manifest.name, number, len(prompts))
                drawn = pipeline(prompt, **own | more, num_images_per_prompt=count)
                images = drawn.images
                row.append([flattened(layer) for layers in images for layer in layers] if manifest.layers else images)
                before += [] if rows else [drawn_from(drawn)]
            report(manifest.name, len(prompts), len(prompts))
        rows.append(row)
        seconds = round(time.perf_counter() - started, 3)
        made.append({"name": manifest.name, "backend": choice.backend, "memory": plan, "seconds": seconds})
    cells = [[picture for pictures in cell for picture in pictures] for cell in zip(before, *rows, strict=True)]
    page = compose(prompts, cells, columns)
    save(page, output)
    unreadable = {name: prompts[number - 1] for number, name in numbered(prompts).items()}
    return {"path": str(output), "width": page.width, "height": page.height, "bundles": made, "numbered": unreadable}


def drawn_from(drawn: Output) -> list[Image]:
    """What others were made of or drawn from, masks, and what controlled them, at their size."""
    from zimgkit.runtime.pictures.reading import flattened
    from zimgkit.runtime.pictures.resizing import resize

    request, inputs = drawn.request, drawn.request.inputs
    start = None if inputs.image in inputs.references else inputs.image
    controls = (inputs.context_image, *(control.image for control in request.controls))
    given = (*inputs.references, start, inputs.mask_image, *controls, *inputs.eligen_entity_masks)
    return [resize(flattened(entry.picture), request.width, request.height) for entry in given if entry]
