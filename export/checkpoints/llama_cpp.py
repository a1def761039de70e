"""Tensors of Qwen2.5-VL's vision tower that llama.cpp cuts apart, joined: q, k and v, and the frames of a kernel.

https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py, ``Qwen2VLVisionModel``
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.tensors.dtypes import to_float32
from zimgkit.export.checkpoints.stored import Decoded, Stored, tensor_rows

QUERY = re.compile(r"(v\.blk\.\d+\.attn_)q(\.weight|\.bias)")
PATCHES = "v.patch_embd.weight"


def joined(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of a file, those that belong together as one, by the name of the whole."""
    found = dict(tensors)
    for name in tensors:
        if match := QUERY.fullmatch(name):
            names = [f"{match[1]}{key}{match[2]}" for key in "qkv"]
            if all(key in found for key in names):
                parts = [found.pop(key) for key in names]
                whole = f"{match[1]}qkv{match[2]}"
                rows = sum(part.shape[0] for part in parts)
                found[whole] = _made(whole, parts, (rows, *parts[0].shape[1:]), partial(_below, parts))
    frames = [PATCHES, f"{PATCHES}.1"]
    if all(key in found and len(found[key].shape) == 4 for key in frames):
        parts = [found.pop(key) for key in frames]
        out, channels, *sides = parts[0].shape
        found[PATCHES] = _made(PATCHES, parts, (out, channels, 2, *sides), partial(_frames, parts, channels))
    return found


def _made(name: str, parts: list[Stored], shape: tuple[int, ...], rows: Any) -> Decoded:
    stored = tuple(info for part in parts for info in (part.stored if isinstance(part, Decoded) else (part,)))
    return Decoded(name, "float32", shape, stored, rows)


def _values(part: Stored, start: int, stop: int) -> NDArray[np.float32]:
    return to_float32(tensor_rows(part, start, stop), part.dtype)


def _below(parts: list[Stored], start: int, stop: int) -> NDArray[np.float32]:
    """Rows of tensors that lie one below the other."""
    found, first = [], 0
    for part in parts:
        begin, end = max(start - first, 0), min(stop - first, part.shape[0])
        if begin < end:
            found.append(_values(part, begin, end))
        first += part.shape[0]
    return np.concatenate(found) if found else np.empty((0, 1), np.float32)


def _frames(parts: list[Stored], channels: int, start: int, stop: int) -> NDArray[np.float32]:
    """Rows of a kernel (out, channels, frames, height, width), whose frames lie apart."""
    frames = [_values(part, start, stop).reshape(stop - start, channels, 1, -1) for part in parts]
    return np.concatenate(frames, axis=2).reshape(stop - start, -1)
