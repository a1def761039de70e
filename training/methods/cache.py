"""What a first stage made of a dataset, on disk: safetensors files of so many rows each, and an index.

The index is written first, and a file takes its place once it is whole. So a stage that was broken off goes on with
the files that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimgkit.engines.errors import CheckpointError, OutputError
from zimgkit.engines.files import replacing
from zimgkit.runtime.progress import Report, silent
from zimgkit.training.dataset import Dataset, Size

INDEX = "cache.json"
ROWS = 64
"""Of a file."""
HINT = "make it anew in another folder"


@dataclass(frozen=True)
class Index:
    """What a cache is of."""

    task: str
    """``"sft"``, ``"direct_distill"`` or ``"trajectory_imitation"``."""
    family: str
    of: str
    """A digest of the bundle, the dataset and the settings."""
    rows: tuple[tuple[str, int, int], ...]
    """Prompt, height and width of each."""
    no_prompts: int
    """How many texts stand for no prompt: the rows after those of the dataset have them."""
    sigmas: Mapping[str, tuple[float, ...]]
    """``"<height>x<width>"`` -> noise levels of the student, down to 0; none where nothing is distilled."""
    scheduler: Mapping[str, Any]
    """What the student's schedule changes in the scheduler's config."""


@dataclass(frozen=True, eq=False)
class Cache:
    """A cache whose files are all there. Use :func:`open_cache`."""

    root: Path
    index: Index

    @cached_property
    def buckets(self) -> dict[Size, Tensor]:
        """As :meth:`zimgkit.training.dataset.Dataset.buckets`."""
        found: dict[Size, list[int]] = {}
        for row, (_, height, width) in enumerate(self.index.rows):
            found.setdefault((height, width), []).append(row)
        return {size: torch.tensor(found[size]) for size in sorted(found)}

    def __len__(self) -> int:
        return len(self.index.rows)

    def get(self, field: str, row: int) -> Tensor:
        """What a row has: ``"text"`` and ``"latents"`` or ``"trajectory"``."""
        found: Tensor = self._files[row // ROWS].get_tensor(f"{field}.{row}")
        return found

    def length(self, row: int) -> int:
        """Tokens of a row's text."""
        return int(self._files[row // ROWS].get_slice(f"text.{row}").get_shape()[0])

    @property
    def sizes(self) -> list[Size]:
        """Height and width of each row's picture, in pixels."""
        return [(height, width) for _, height, width in self.index.rows]

    def of_rows(self, rows: Tensor) -> Tensor:
        """The latents of rows of one size: (n, channels, height / 8, width / 8) float32."""
        return torch.stack([self.get("latents", int(row)) for row in rows]).float()

    @cached_property
    def _files(self) -> list[Any]:
        from safetensors import SafetensorError, safe_open

        opened = []
        for path in _files(self.root, self.index):
            try:
                opened.append(safe_open(path, "pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{path} cannot be read ({error})", "remove it and run data_process again"
                ) from None
        return opened


class Texts:
    """The texts of a cache as a sequence: of the dataset's rows, or those that stand for no prompt."""

    def __init__(self, cache: Cache, *, no_prompts: bool = False) -> None:
        self._cache = cache
        self._first = len(cache) if no_prompts else 0
        self._count = cache.index.no_prompts if no_prompts else len(cache)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> Tensor:
        return self._cache.get("text", self._first + place)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[place] for place in range(len(self)))


def make_cache(root: Path, index: Index, make: Callable[[int], Mapping[str, Tensor]], report: Report = silent) -> None:
    """Write what is missing of a cache.

    Args:
        root: its folder.
        index: what it is of.
        make: row -> its tensors by field; rows past the dataset's have a text alone.
        report: called with (stage, done, total).

    Raises:
        OutputError: the folder holds another cache, or cannot be written.
    """
    from safetensors.torch import save_file

    path = root / INDEX
    text = json.dumps(asdict(index), ensure_ascii=False, indent=1)
    if path.exists():
        if _read(root) != index:
            raise OutputError(f"{root} holds a cache of something else", "name another folder, or remove it")
    elif root.exists() and any(root.iterdir()):
        raise OutputError(f"{root} is not empty, and holds no cache", "name another folder")
    else:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                part.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{root} cannot be written ({error.strerror or error})", "name another folder") from None
    total = len(index.rows) + index.no_prompts
    for number, file in enumerate(_files(root, index)):
        rows = range(number * ROWS, min((number + 1) * ROWS, total))
        if not file.exists():
            tensors: dict[str, Tensor] = {}
            for row in rows:
                tensors |= {f"{field}.{row}": value.contiguous() for field, value in make(row).items()}
                report(index.task, row + 1, total)
            try:
                with replacing(file) as part:
                    save_file(tensors, part)
            except OSError as error:
                raise OutputError(f"{file} cannot be written ({error.strerror or error})", "free some space") from None
        report(index.task, rows.stop, total)


def open_cache(root: Path) -> Cache:
    """Open what a first stage made.

    Raises:
        CheckpointError: it is none, of another version, or not all of it is there.
    """
    index = _read(root)
    if missing := [file.name for file in _files(root, index) if not file.exists()]:
        lack = f"{root} lacks {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        raise CheckpointError(lack, "run data_process again: it goes on")
    return Cache(root, index)


def is_cache(root: Path) -> bool:
    """Whether a folder is one of these, and no dataset."""
    return (root / INDEX).is_file()


def rows_of(dataset: Dataset) -> tuple[tuple[str, int, int], ...]:
    """A dataset's rows as an index has them."""
    return tuple((row.prompt, *row.size) for row in dataset.rows)


def _files(root: Path, index: Index) -> list[Path]:
    total = len(index.rows) + index.no_prompts
    return [root / f"{number:06}.safetensors" for number in range(-(-total // ROWS))]


def _read(root: Path) -> Index:
    import msgspec

    path = root / INDEX
    try:
        return msgspec.json.decode(path.read_bytes(), type=Index)
    except FileNotFoundError:
        raise CheckpointError(f"{root} holds no {INDEX}", "make it with a task that ends in :data_process") from None
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})", HINT) from None
