"""What DiffSynth-Studio gave for a call, kept as arrays: see README.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent / "recorded"
LEVELS = 65535
"""Pixels are kept in so many levels."""


@dataclass(frozen=True, eq=False)
class Recording:
    """A call and what came of it."""

    checkpoint: str
    """One of :data:`.checkpoints.CHECKPOINTS`."""
    lora: str
    """The name of its LoRA, for :func:`.checkpoints.write_lora`; empty where there is none."""
    call: Mapping[str, Any]
    """The arguments in DiffSynth's words, pictures among them."""
    arrays: Mapping[str, np.ndarray]
    """Tensors, by their names in README.md."""

    @property
    def pixels(self) -> np.ndarray:
        """float32 (height, width, 3) from 0 to 1."""
        return self.arrays["pixels"].astype(np.float32) / LEVELS


def names(system: str) -> list[str]:
    """The recordings of a system, to be read by :func:`read`."""
    return sorted(file.stem for file in FOLDER.glob(f"{system}.*.npz"))


def read(name: str) -> Recording:
    """Read one.

    Args:
        name: one of :func:`names`.
    """
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    said = json.loads(str(arrays.pop("said")))
    call = {key: _with_pictures(value, arrays) for key, value in said.pop("call").items()}
    return Recording(**said, call=call, arrays=arrays)


def write(name: str, recording: Recording) -> None:
    """Write one; its pictures are kept as arrays."""
    arrays: dict[str, np.ndarray] = {}
    call = {key: _without_pictures(value, key, arrays) for key, value in recording.call.items()}
    said = json.dumps({"checkpoint": recording.checkpoint, "lora": recording.lora, "call": call})
    np.savez_compressed(FOLDER / f"{name}.npz", said=np.array(said), **arrays, **recording.arrays)


def _with_pictures(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_with_pictures(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"picture"}:
        return Image.fromarray(arrays.pop(value["picture"]))
    return {key: _with_pictures(item, arrays) for key, item in value.items()}


def _without_pictures(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_without_pictures(item, f"{name}.{index}", arrays) for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: _without_pictures(item, f"{name}.{key}", arrays) for key, item in value.items()}
    if not isinstance(value, Image.Image):
        return value
    arrays[name] = np.asarray(value)
    return {"picture": name}
