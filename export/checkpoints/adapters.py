"""A network that peft has wrapped and that was saved as it is: its adapters are merged, as a LoRA would be."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import CheckpointError
from zimgkit.engines.tensors.dtypes import to_float32
from zimgkit.engines.tensors.safetensors import read_metadata
from zimgkit.export.checkpoints.peft_config import PeftConfig, read_peft_config
from zimgkit.export.checkpoints.stored import Decoded, Stored, part_of, row_count, row_width, tensor_rows

UNSCALED = "with an adapter of unknown alpha"
"""What weights are stored in whose adapters were merged at the scale 1, for nothing tells theirs."""
BASE = re.compile(r"(.+\.)?base_layer\.(weight|bias)")
ADAPTER = re.compile(r"(.+)\.(lora_A|lora_B|lora_\w+|hada_\w+|lokr_\w+|vera_\w+)(?:\.(\w+))?(?:\.weight)?")


def merged_adapters(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The stored tensors of a component, with peft's adapters merged and its names taken away.

    Their scale is alpha over the rank, by the ``adapter_config.json`` beside the file or in its header; 1 without one.

    Raises:
        LoraError: the config cannot be read.
        CheckpointError: adapters of other kinds than LoRA, several at once, or of shapes that do not fit.
    """
    bases = {match[1] or "": match[2] for name in tensors if (match := BASE.fullmatch(name))}
    if not bases:
        return dict(tensors)
    found: dict[str, Stored] = {}
    pairs: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        match = ADAPTER.fullmatch(name)
        if match is None or f"{match[1]}." not in bases:
            base = BASE.fullmatch(name)
            key = f"{base[1] or ''}{base[2]}" if base else name
            found[key] = part_of(tensor, key, tensor.shape) if base else tensor
            continue
        if match[2] not in ("lora_A", "lora_B"):
            raise CheckpointError(f"{tensor.file}: {name!r} is of an adapter that is no LoRA", "save the model merged")
        if match[2] in pairs.setdefault(match[1], {}):
            raise CheckpointError(f"{tensor.file}: {match[1]!r} has several adapters", "save the model merged")
        pairs[match[1]][match[2]] = tensor
    for module, pair in pairs.items():
        key = f"{module}.weight"
        if key not in found or len(pair) < 2:
            raise CheckpointError(f"{next(iter(pair.values())).file}: half of the adapter of {module!r} is missing")
        scale = _scale(module, pair["lora_A"])
        found[key] = _merged(key, found[key], pair["lora_A"], pair["lora_B"], scale)
    return found


def _scale(module: str, down: Stored) -> float | None:
    """What an adapter is multiplied by; None where nothing tells its alpha."""
    config = _config(down.file)
    alpha = config.alpha_of(module) if config else None
    rank = row_count(down.shape)
    if config is None or alpha is None or not rank:
        return None
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _config(file: Path) -> PeftConfig | None:
    return _read_config(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _read_config(file: Path, modified: int) -> PeftConfig | None:
    metadata = read_metadata(file) if file.suffix == ".safetensors" else {}
    return read_peft_config(file, metadata, beside_any=True)


def _merged(name: str, base: Stored, down: Stored, up: Stored, scale: float | None) -> Decoded:
    """A weight, (out, in), and the scaled product of (out, rank) and (rank, in)."""
    fits = len(down.shape) == len(up.shape) == len(base.shape) == 2
    if not fits or (row_count(up.shape), row_width(down.shape)) != base.shape or up.shape[1] != down.shape[0]:
        raise CheckpointError(f"{base.file}: {name!r} and its adapter differ in shape", "save the model merged")

    def rows(start: int, stop: int) -> NDArray[np.float32]:
        left, right = tensor_rows(up, start, stop), tensor_rows(down, 0, down.shape[0])
        own = to_float32(tensor_rows(base, start, stop), base.dtype)
        product = to_float32(left, up.dtype) @ to_float32(right, down.dtype)
        return own + (product if scale is None else np.float32(scale) * product)

    stored = base.stored if isinstance(base, Decoded) else (base,)
    return Decoded(name, "float32", base.shape, stored, rows, UNSCALED if scale is None else "with an adapter")
