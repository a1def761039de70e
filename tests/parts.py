"""Bundles of parts that no checkpoint is built into: with weights that are given, or holes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests import handmade
from zimgkit.engines.bundle import Bundle, Component, record_files, write_manifest
from zimgkit.engines.tensors.safetensors import layout
from zimgkit.export.checkpoints.stored import Stored
from zimgkit.export.components import wanted_by
from zimgkit.export.networks.parts import Part
from zimgkit.export.weights.stream import export_weights
from zimgkit.export.writing import write_component


def write_parts(
    root: Path,
    parts: Mapping[str, Part],
    weights: Mapping[str, NDArray[np.float32]] | None = None,
    *,
    family: str = "qwen-image",
    precision: str = "bfloat16",
) -> Bundle:
    """Write parts of one source, and their variants.

    Args:
        root: a new folder.
        parts: component -> part.
        weights: tensor -> its values, as a checkpoint in float32 has them. When None, all are holes in the bundle's own
            type, which read as zero.
        family: of the manifest.
        precision: of the bundle.
    """
    root.mkdir(parents=True)
    checkpoint = root.with_name(f"{root.name}.safetensors")
    shapes = {name: shape for part in parts.values() for name, shape in part.stored_shapes().items()}
    stored = precision if weights is None else "float32"
    header, infos = layout(checkpoint, {name: (stored, shape) for name, shape in shapes.items()})
    with checkpoint.open("wb") as file:
        file.write(header)
        for name, info in infos.items():
            if weights is not None:
                file.write(np.ascontiguousarray(weights[name], np.float32).data)
            else:
                file.truncate(info.offset + info.nbytes)

    def tensors(source: str) -> Mapping[str, Stored]:
        return infos

    placed = export_weights({name: wanted_by(tensors, part) for name, part in parts.items()}, precision, root)
    components: dict[str, Component] = {}
    for name, part in parts.items():
        components |= write_component(name, part, placed[name], precision, root)
    changes: dict[str, Any] = {"precision": precision, "components": components, "files": record_files(root)}
    write_manifest(root, handmade.manifest(family, **changes))
    return Bundle.open(root, verify=False)
