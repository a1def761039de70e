"""Bundles written by hand: files of any content, and a manifest that lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zimgkit.engines.bundle import (
    SCHEMA_VERSION,
    Component,
    Defaults,
    Manifest,
    Source,
    TextConfig,
    record_files,
    write_manifest,
)


def manifest(family: str = "z-image", **changes: Any) -> Manifest:
    """A manifest of no files; ``changes`` replace its fields."""
    qwen_image = family == "qwen-image"
    fields: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "zimgkit_version": "0.0.0",
        "family": family,
        "name": "Handmade",
        "precision": "float32",
        "tasks": ("text-to-image",),
        "sources": {"checkpoint": Source("somewhere/handmade")},
        "text": TextConfig("<", ">", 34, 1058, 512) if qwen_image else TextConfig("<", ">", 0, 1024, 512),
        "defaults": Defaults(20, 4.0, 1328, 1664, " ") if qwen_image else Defaults(9, 3.5, 1024, 768),
        "scheduler": {},
        "config": {},
        "components": {},
        "files": {},
    }
    return Manifest(**(fields | changes))


def write_bundle(root: Path, files: dict[str, bytes], **changes: Any) -> Path:
    """Write files and their manifest; safetensors files are the weights of a component ``net`` by default."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    weights = tuple(name for name in files if name.endswith(".safetensors"))
    changes = {"components": {"net": Component(weights)}, "files": record_files(root)} | changes
    write_manifest(root, manifest(**changes))
    return root
