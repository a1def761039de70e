"""The bundle on disk: the contract between ``zimg-export`` and ``zimg-run``."""

from zimgkit.engines.bundle.manifest import (
    CHECKPOINT,
    CPU_GRAPH,
    MANIFEST,
    SCHEMA_VERSION,
    TEXT_TO_IMAGE,
    CompiledEngine,
    Component,
    Cost,
    Defaults,
    Difference,
    FileRecord,
    Manifest,
    MergedLora,
    Quantization,
    Range,
    Refit,
    Source,
    TensorSpec,
    TextConfig,
)
from zimgkit.engines.bundle.opened import Bundle
from zimgkit.engines.bundle.verified import sha256
from zimgkit.engines.bundle.writing import atomic_folder, record_files, write_manifest

__all__ = [
    "CHECKPOINT",
    "CPU_GRAPH",
    "MANIFEST",
    "SCHEMA_VERSION",
    "TEXT_TO_IMAGE",
    "Bundle",
    "CompiledEngine",
    "Component",
    "Cost",
    "Defaults",
    "Difference",
    "FileRecord",
    "Manifest",
    "MergedLora",
    "Quantization",
    "Range",
    "Refit",
    "Source",
    "TensorSpec",
    "TextConfig",
    "atomic_folder",
    "record_files",
    "sha256",
    "write_manifest",
]
