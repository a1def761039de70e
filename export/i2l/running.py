"""One network at a time over its own weight files, through whatever backend runs bundles.

A graph and links to the files are a bundle for as long as it runs: weights are mapped and not copied, nor kept in
another form, for each is read a few times at the most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import zimgkit
from zimgkit.engines.base import Engine, open_engine
from zimgkit.engines.bundle import (
    CHECKPOINT,
    SCHEMA_VERSION,
    Bundle,
    Defaults,
    FileRecord,
    Manifest,
    Source,
    TextConfig,
)
from zimgkit.engines.choice import AUTO, choose_backend
from zimgkit.engines.errors import CheckpointError, OutOfMemoryError
from zimgkit.engines.tensors.safetensors import TensorInfo
from zimgkit.export.i2l.models import Model
from zimgkit.export.weights.layout import weights_name
from zimgkit.export.weights.stream import Progress, Wanted, write_wanted
from zimgkit.export.writing import write_component
from zimgkit.runtime.memory.amounts import gigabytes
from zimgkit.runtime.memory.fitting import budget_of
from zimgkit.runtime.memory.needs import Need, encoder_need, on_host
from zimgkit.runtime.memory.plan import Shortage, plan
from zimgkit.runtime.progress import Report


@dataclass(frozen=True)
class Place:
    """Where networks run."""

    backend: str = AUTO
    device: str | None = None
    memory: str | int | None = "auto"
    """How much they may take, as a session's."""


@contextmanager
def opened(
    model: Model, place: Place, folder: Path, widths: tuple[int, int], tokens: int, report: Report
) -> Iterator[Engine]:
    """Open a network, and close it at the end.

    Args:
        model: what to open.
        place: where it runs.
        folder: an empty folder, to write graphs into.
        widths: its width and its feed-forward's, and
        tokens: how many it computes on, which tell its working memory.
        report: called with (stage, done, total).

    Raises:
        OutOfMemoryError: it does not fit.
        BackendError: the backend is not installed or cannot run it.
        CheckpointError: a weight has NaN or Inf.
    """
    name = model.part.source
    bundle = _bundle(model, folder, report)
    backend = place.backend
    if backend == AUTO:
        backend = choose_backend(bundle.manifest, place.device).backend
    host = on_host(backend, place.device)
    size = bundle.component(name).weight_bytes
    need = encoder_need(size, bundle.manifest.precision, backend, widths, tokens)
    if host:
        _check_fits(name, need, place)
    engine = open_engine(bundle, name, backend, place.device)
    try:
        yield engine
    finally:
        engine.close()


def _check_fits(name: str, need: Need, place: Place) -> None:
    found = plan({name: need}, None, budget_of(place.memory, host=True), in_turn=True)
    if isinstance(found, Shortage):
        raise OutOfMemoryError(
            f"{name} takes {gigabytes(found.needed)}, and {gigabytes(found.available)} are {found.source}",
            "close other programs, or use a machine with more",
        )


def _bundle(model: Model, folder: Path, report: Report) -> Bundle:
    """A bundle of one component, its weights where they are; what is neither float32 nor bfloat16 is cast."""
    name, tensors = model.part.source, model.tensors
    precision = "bfloat16" if all(info.dtype == "bfloat16" for info in tensors.values()) else "float32"
    wants = {key: Wanted(info, info.shape) for key, info in tensors.items()}
    cast = {key: (want, precision) for key, want in wants.items() if not want.is_kept(precision)}
    progress = Progress(sum(4 * int(np.prod(want.shape)) for want, _ in cast.values()), _named(report, "weights"))
    placed = write_wanted(folder / weights_name(name), cast, progress) if cast else {}
    by_key = {key: placed[want.name] for key, (want, _) in cast.items()}
    links: dict[Path, Path] = {}
    (folder / name).mkdir()
    for key, info in tensors.items():
        if key not in by_key:
            by_key[key] = replace(info, file=_link(info, folder / name, links))
    components = write_component(name, model.part, by_key, precision, folder)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        zimgkit_version=zimgkit.__version__,
        family="",
        name=name,
        precision=precision,
        tasks=(),
        sources={CHECKPOINT: Source(model.name)},
        text=TextConfig("", "", 0, 1, 1),
        defaults=Defaults(1, 0.0, 1, 1),
        scheduler={},
        config={},
        components=components,
        files={file: FileRecord(path.stat().st_size, "") for file, path in files.items()},
    )
    return Bundle(folder.resolve(), manifest, in_place=True)


def _link(info: TensorInfo, folder: Path, links: dict[Path, Path]) -> Path:
    """A link in a folder to a tensor's file."""
    if info.file not in links:
        links[info.file] = folder / info.file.name
        links[info.file].symlink_to(info.file.resolve())
    return links[info.file]


def _named(report: Report, stage: str) -> Any:
    return lambda done, total: report(stage, done, total)


def run(
    engine: Engine, feeds: Sequence[Mapping[str, NDArray[Any]]], where: str, report: Report
) -> list[dict[str, NDArray[np.float32]]]:
    """What a network gives for each of some inputs.

    Args:
        engine: the network's.
        feeds: all inputs of each run.
        where: its file, for messages.
        report: called with (stage, done, total).

    Raises:
        CheckpointError: it gave NaN or Inf.
    """
    found = []
    for index, own in enumerate(feeds):
        report("encode", index, len(feeds))
        results = engine.run(own)
        if not all(np.isfinite(values).all() for values in results.values()):
            raise CheckpointError(f"{where} gives NaN or Inf for picture {index + 1}", "fetch the file again")
        found.append(results)
    report("encode", len(feeds), len(feeds))
    return found
