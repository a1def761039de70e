"""What is trained made ready to come with zimgkit: checkpoint and bundle in one folder, on the same weights."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import msgspec

from zimgkit.engines.bundle import CPU_GRAPH, MANIFEST, Bundle, Source, atomic_folder, write_manifest
from zimgkit.engines.errors import CheckpointError
from zimgkit.engines.files import temporary_folder
from zimgkit.export.build import export
from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.export.controls.change import add
from zimgkit.export.controls.nets import role
from zimgkit.runtime.demo_models.assembled import DIFFERENCE, WEIGHTS, add_difference
from zimgkit.runtime.progress import Report, silent
from zimgkit.training.difference import write_difference


def ship(
    checkpoint: Path, out: Path, *, tasks: Collection[str] = (), overwrite: bool = False, report: Report = silent
) -> None:
    """Build a checkpoint's bundle in bfloat16, and put what else the checkpoint holds beside it.

    The bundle has no graphs for ONNX Runtime's CPU kernels alone.

    Args:
        checkpoint: in the diffusers layout, in bfloat16. Its folder's name becomes the bundle's.
        out: the new folder, on the same disk as the checkpoint.
        tasks: what the bundle shall be asked for beside pictures from text.
        overwrite: replace a bundle that is there.
        report: called with (stage, done, total).

    Raises:
        CheckpointError: its weights are not those of the bundle, say because they are not in bfloat16.
        ZimgError: whatever else went wrong, in one line.
    """
    opened = open_checkpoint(os.fspath(checkpoint))
    # Where the checkpoint lay when it was made is nobody's concern; by its name it is found wherever zimgkit is.
    opened = replace(opened, source=Source(opened.name, None, opened.source.files))
    with atomic_folder(out.expanduser().absolute(), overwrite=overwrite, known_by=MANIFEST) as work:
        export(opened, work, "bfloat16", report, tasks=tasks)
        if copied := [file.name for file in work.glob("*.safetensors") if file.stem in {"text_encoder", "denoiser"}]:
            raise CheckpointError(
                f"{checkpoint} does not share {', '.join(copied)} with its bundle", "store it in bf16"
            )
        _drop_cpu_graphs(work)
        _copy_files(checkpoint, work, lambda name: not (work / name).exists())


def ship_editor(checkpoint: Path, base: Path, out: Path, *, overwrite: bool = False, report: Report = silent) -> None:
    """Write what makes another model of one that comes with zimgkit, see :mod:`zimgkit.runtime.demo_models.assembled`.

    Args:
        checkpoint: trained on from ``base``, all but its transformer unchanged, in bfloat16. Its folder's name becomes
            the model's.
        base: the folder of the other one, which :func:`ship` made.
        out: the new folder, on the same disk as the checkpoint.
        overwrite: replace a folder that is there.
        report: called with (stage, done, total).

    Raises:
        ZimgError: whatever went wrong, in one line.
    """
    with atomic_folder(out.expanduser().absolute(), overwrite=overwrite, known_by=MANIFEST) as work:
        write_difference(work / DIFFERENCE, base / WEIGHTS, checkpoint / WEIGHTS)
        with temporary_folder(work, "whole") as folder:
            rounded, whole = folder / checkpoint.name, folder / "whole"
            shutil.copytree(checkpoint, rounded)
            shutil.copy2(base / WEIGHTS, rounded / WEIGHTS)
            add_difference(rounded / WEIGHTS, work / DIFFERENCE)
            ship(rounded, whole, report=report)

            def is_shared(name: Path) -> bool:
                return (base / name).is_file() and filecmp.cmp(whole / name, base / name, shallow=False)

            _copy_files(whole, work, lambda name: not is_shared(name) and name != Path(WEIGHTS))


def ship_controlnet(
    net: Path, bundle: Path, out: Path, name: str, *, overwrite: bool = False, report: Report = silent
) -> None:
    """Copy what :func:`ship` made, with a ControlNet.

    Args:
        net: its file, whose name without its end it is known by.
        bundle: the folder.
        out: the new folder.
        name: what calls name the net.
        overwrite: replace a bundle that is there.
        report: called with (stage, done, total).

    Raises:
        ZimgError: whatever went wrong, in one line.
    """
    with atomic_folder(out.expanduser().absolute(), overwrite=overwrite, known_by=MANIFEST) as work:
        shutil.copytree(bundle, work, dirs_exist_ok=True)
        changed = add(work, [f"{name}={net}"], report=report).bundle
        manifest, key = changed.manifest, role(name)
        source = msgspec.structs.replace(manifest.sources[key], model=net.stem)
        write_manifest(work, msgspec.structs.replace(manifest, sources=manifest.sources | {key: source}))
        _drop_cpu_graphs(work)


def _copy_files(source: Path, target: Path, is_wanted: Callable[[Path], bool]) -> None:
    """Copy the files of a folder that are wanted, by their names in it."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source)
        if is_wanted(name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target / name)


def _drop_cpu_graphs(folder: Path) -> None:
    """Take the graphs for ONNX Runtime's CPU kernels alone out of a bundle: networks so small gain nothing by them."""
    manifest = Bundle.read(folder).manifest
    components = dict(manifest.components)
    for name, component in manifest.components.items():
        if CPU_GRAPH in component.graphs:
            graphs = {key: file for key, file in component.graphs.items() if key != CPU_GRAPH}
            components[name] = msgspec.structs.replace(component, graphs=graphs)
            (folder / component.graphs[CPU_GRAPH]).unlink()
    files = {file: record for file, record in manifest.files.items() if (folder / file).exists()}
    write_manifest(folder, msgspec.structs.replace(manifest, components=components, files=files))
