"""What a checkpoint is and what it would become, from its configs alone: no weights are fetched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zimgkit.export.checkpoints.checkpoint import open_configs
from zimgkit.export.components import check_source
from zimgkit.export.networks.registry import is_needed, parts, tasks_of


def checkpoint_summary(
    model: str,
    *,
    revision: str | None = None,
    source: str = "huggingface",
    files: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Describe a checkpoint, and check the weights that are on this machine as a build does.

    Args:
        model: a folder, a hub id or a short name.
        revision: branch, tag or commit on the hub.
        source: ``"huggingface"`` or ``"modelscope"``.
        files: component -> a weight file in its place.

    Raises:
        CheckpointError: there is none, or a build would refuse it.
    """
    checkpoint = open_configs(model, revision=revision, source=source, files=files)
    components: dict[str, Any] = {}
    tasks = tasks_of(checkpoint.family, checkpoint.pipeline, ())
    present = {*checkpoint.files, *(file.partition("/")[0] for file in checkpoint.source.files)}
    beside = {str(file): file.stat().st_size for file in checkpoint.files.values()}
    for part_source in checkpoint.components:
        own = parts(checkpoint.family, part_source, checkpoint.config(part_source), tasks)
        own = {name: part for name, part in own.items() if is_needed(name, tasks)}
        if part_source in present:
            check_source(checkpoint, part_source, own)
        for name, part in own.items():
            shapes = part.parameters()
            count = sum(math.prod(shape) for shape in shapes.values())
            components[name] = {"from": part_source, "tensors": len(shapes), "parameters": count}
    scheduler = checkpoint.config("scheduler")
    return {
        "name": checkpoint.name,
        "family": checkpoint.family,
        "path": str(checkpoint.root),
        "revision": checkpoint.source.revision,
        "weight_files": checkpoint.source.files | beside,
        "tasks": list(tasks),
        "scheduler": scheduler,
        "components": components,
        "parameters": sum(component["parameters"] for component in components.values()),
        "notes": checkpoint.notes(name for name in checkpoint.components if name in present),
    }


def checkpoint_text(summary: dict[str, Any]) -> str:
    """Format the result of :func:`checkpoint_summary` for people."""
    files = summary["weight_files"]
    total = sum(files.values())
    lines = [
        f"{summary['name']}  ({summary['family']}, {summary['parameters'] / 1e9:.3g} billion parameters in use)",
        f"  path      {Path(summary['path'])}",
        f"  weights   {len(files)} files, {total / 1e9:.3g} GB" if files else "  weights   not on this machine",
        "  becomes",
    ]
    lines.extend(
        f"    {name:<14}{entry['parameters']:>16,} parameters in {entry['tensors']} tensors of the {entry['from']}"
        for name, entry in summary["components"].items()
    )
    lines.extend(f"  warning   {note}" for note in summary["notes"])
    return "\n".join(lines)
