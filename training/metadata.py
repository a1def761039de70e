"""The table of a dataset: ``metadata.csv``, ``metadata.json`` or ``metadata.jsonl``, as DiffSynth-Studio reads them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zimgkit.engines.errors import ZimgError

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.json")


class DatasetError(ZimgError):
    """A dataset is missing, broken, or holds what cannot be trained on."""


Entry = tuple[str, Mapping[str, Any]]
"""Where a row stands, for errors, and its values by column."""


def find_table(root: Path) -> Path:
    """The table in a dataset's folder: the first of :data:`NAMES` that is there.

    Raises:
        DatasetError: there is none.
    """
    for name in NAMES:
        if (root / name).exists():
            return root / name
    raise DatasetError(f"{root / NAMES[0]} is missing", "a dataset is a folder with one (image,prompt)")


def read_table(path: Path, columns: tuple[str, ...]) -> list[Entry]:
    """All rows of a table.

    Args:
        path: of a comma-separated table with a header, a JSON list of objects, or an object on each line.
        columns: what every row must have.

    Raises:
        DatasetError: naming the file and the line: it cannot be read, a row is broken, a column is missing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing", f"a dataset has a table ({','.join(columns)})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read ({error})", "it should be a text file in UTF-8") from None
    read = {".csv": _csv, ".json": _json, ".jsonl": _json_lines}.get(path.suffix)
    if read is None:
        raise DatasetError(f"{path} is no table that is known", "name it .csv, .json or .jsonl")
    rows = list(read(path, text, columns))
    if not rows:
        raise DatasetError(f"{path} has no rows", "add a line for each picture")
    return rows


def _csv(path: Path, text: str, columns: tuple[str, ...]) -> Iterator[Entry]:
    """Cells that begin as a list are read as JSON."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if not set(columns) <= set(header):
            raise DatasetError(f"{path} has the columns {','.join(header) or 'none'}", f"name them {','.join(columns)}")
        for fields in reader:
            if not fields:
                continue
            where = f"{path}, line {reader.line_num}"
            if len(fields) != len(header):
                raise DatasetError(
                    f"{where}: broken row, {len(fields)} fields instead of {len(header)}",
                    "put quotes around captions with commas",
                )
            cells = {name: value.strip() for name, value in zip(header, fields, strict=True)}
            yield where, {name: _listed(where, name, value) for name, value in cells.items()}
    except csv.Error as error:
        raise DatasetError(f"{path}, line {reader.line_num}: broken row ({error})", "check its quotes") from None


def _listed(where: str, name: str, value: str) -> Any:
    if name == "prompt" or not value.startswith("["):
        return value
    return _parsed(value, f"{where}: {name}")


def _json(path: Path, text: str, columns: tuple[str, ...]) -> Iterator[Entry]:
    rows = _parsed(text, str(path))
    if not isinstance(rows, list):
        raise DatasetError(f"{path} holds no list", "it should be a list with an object for each picture")
    for number, row in enumerate(rows, start=1):
        yield _object(f"{path}, row {number}", row, columns)


def _json_lines(path: Path, text: str, columns: tuple[str, ...]) -> Iterator[Entry]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _object(where, _parsed(line, where), columns)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DatasetError(f"{where}: broken JSON ({error})", "mend it") from None


def _object(where: str, row: Any, columns: tuple[str, ...]) -> Entry:
    if not isinstance(row, dict):
        raise DatasetError(f"{where}: {str(row)[:40]!r} is no object", f"write {{{', '.join(columns)}}}")
    if missing := [name for name in columns if name not in row]:
        has = ",".join(map(str, row)) or "none"
        raise DatasetError(f"{where}: there is no {missing[0]}, only the columns {has}", f"name it {missing[0]}")
    return where, row
