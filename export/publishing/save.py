"""``zimg-export export``: a bundle's weights into files that others read."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from zimgkit.engines.bundle import Bundle, atomic_folder
from zimgkit.engines.bundle.locks import only_writer_of
from zimgkit.engines.errors import OutputError, UsageError
from zimgkit.engines.files import replacing
from zimgkit.engines.tensors import safetensors
from zimgkit.export.networks.registry import WEIGHT_FILES
from zimgkit.export.publishing import comfyui, diffusers
from zimgkit.export.publishing.held import Held, Tensors, checkpoint_of, held, zeros
from zimgkit.export.weights.stream import Progress
from zimgkit.runtime.progress import Report, silent

FORMATS = ("diffusers", "comfyui")
INDEX = "model_index.json"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Saved:
    """What was written."""

    path: Path
    files: dict[str, int]
    """Names of weight files -> their bytes."""
    notes: tuple[str, ...]
    """What is not as in the checkpoint, a sentence each."""


def save(
    path: Path, out: Path, kind: str, *, model: str | None = None, overwrite: bool = False, report: Report = silent
) -> Saved:
    """Write a bundle as a checkpoint that other programs read, its LoRAs merged; no tensor is ever whole in memory.

    Args:
        path: the bundle's folder.
        out: what to write.
        kind: of :data:`FORMATS`.
        model: the checkpoint it was built from, where that is not where it was, for what the bundle has not.
        overwrite: replace what was written before.
        report: called with (stage, done, total).

    Raises:
        ZimgError: whatever went wrong, in one line. Nothing is left behind then.
    """
    if kind not in FORMATS:
        raise UsageError(f"no format is called {kind!r}", f"choose one of {', '.join(FORMATS)}")
    out = out.expanduser().absolute()
    bundle = Bundle.open(path)
    checkpoint = checkpoint_of(bundle, model)
    found = held(bundle, checkpoint)
    files = _files(bundle, found, kind)
    if kind == "comfyui" and out.suffix == SUFFIX:
        components = dict(zip(found, files.values(), strict=True))
        whole = comfyui.of_all(components, bundle.manifest.config["text_encoder"])
        with only_writer_of(out), _atomic_file(out, overwrite=overwrite) as part:
            sizes = {out.name: _write(part.parent, {part.name: whole}, report)[part.name]}
        return Saved(out, sizes, tuple(_notes(bundle, found)))
    known_by = INDEX if kind == "diffusers" else f"{comfyui.FOLDERS['transformer']}/{bundle.manifest.name}{SUFFIX}"
    with only_writer_of(out), atomic_folder(out, overwrite=overwrite, known_by=known_by) as folder:
        sizes = _write(folder, files, report)
        if kind == "diffusers":
            diffusers.write_rest(bundle, checkpoint, folder)
    return Saved(out, sizes, tuple(_notes(bundle, found)))


def _files(bundle: Bundle, found: Mapping[str, Held], kind: str) -> dict[str, Tensors]:
    """Weight files of a folder, one for each component, and what they hold."""
    files: dict[str, Tensors] = {}
    for source, own in found.items():
        # What is not there is zeros.
        whole = own.tensors | {name: zeros(shape, bundle.manifest.precision) for name, shape in own.absent.items()}
        if kind == "comfyui":
            files[f"{comfyui.FOLDERS[source]}/{bundle.manifest.name}{SUFFIX}"] = comfyui.named(source, whole)
        else:
            names = {diffusers.stored_name(source, name): tensor for name, tensor in whole.items()}
            files[f"{source}/{WEIGHT_FILES[source]}{SUFFIX}"] = names
    return files


@contextlib.contextmanager
def _atomic_file(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a file beside ``target`` to write, which takes its place at the end."""
    if target.is_dir() or (target.exists() and not overwrite):
        hint = "name another file" + ("" if target.is_dir() else ", or replace it with --overwrite")
        raise OutputError(f"{target} exists already", hint)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            yield part
    except OSError as error:
        message = f"{target} cannot be written ({error.strerror or error})"
        raise OutputError(message, "free some space, or check the path and its rights") from None


def _write(folder: Path, files: Mapping[str, Tensors], report: Report) -> dict[str, int]:
    """Write weight files; returns their sizes."""
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    if total > free:
        message = f"{folder.parent} has {free / 1e9:.1f} GB free, and the checkpoint needs {total / 1e9:.1f} GB"
        raise OutputError(message, "free some space, or name a folder on another disk")
    progress = Progress(total, lambda done, total: report("weights", done, total))
    for name, tensors in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        safetensors.write(
            folder / name,
            {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()},
            {key: progress.count(tensor.pieces()) for key, tensor in tensors.items()},
            {"format": "pt"},
        )
    return {name: (folder / name).stat().st_size for name in files}


def _notes(bundle: Bundle, found: Mapping[str, Held]) -> Iterator[str]:
    precision = bundle.manifest.precision
    for source, own in found.items():
        if own.dequantized:
            kind = bundle.manifest.quantized
            yield f"{source}: {own.dequantized} weights of {kind} were multiplied out to {precision}"
        if own.unfolded:
            yield (
                f"{source}: {own.unfolded} kernels have zeros for the frames before a still image: pictures are the "
                "same, videos are not; the checkpoint's own are taken where it is, or is named with --model"
            )
        if own.absent:
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in own.absent))
            yield (
                f"{source}: {len(own.absent)} tensors are zeros (of {parts}): the bundle has none of them, for what it "
                f"draws needs none; they are taken from the checkpoint where it is, or is named with --model"
            )
