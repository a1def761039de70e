"""What is trained made ready to come with zimgkit: checkpoint and bundle in one folder, on the same weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import msgspec

from zimgkit.engines.bundle import MANIFEST, Source, atomic_folder, write_manifest
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.build import export
from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.export.controls.change import add
from zimgkit.export.controls.nets import component_of, role
from zimgkit.runtime.progress import Report, silent


def ship(
    checkpoint: Path, out: Path, *, tasks: Collection[str] = (), overwrite: bool = False, report: Report = silent
) -> None:
    """Build a checkpoint's bundle in bfloat16, and put what else the checkpoint holds beside it.

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
        for file in sorted(checkpoint.rglob("*")):
            target = work / file.relative_to(checkpoint)
            if file.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target)


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
        component = manifest.components[component_of(name)]
        graphs, dropped = dict(component.graphs), component.graphs["onnxruntime"]
        # As the others of these bundles: so small a denoiser gains nothing by a graph for ONNX Runtime alone.
        del graphs["onnxruntime"]
        components = {component_of(name): msgspec.structs.replace(component, graphs=graphs)}
        changes = msgspec.structs.replace(
            manifest,
            sources=manifest.sources | {key: source},
            components=manifest.components | components,
            files={file: record for file, record in manifest.files.items() if file != dropped},
        )
        write_manifest(work, changes)
        (work / dropped).unlink()
