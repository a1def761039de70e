"""Safetensors files by offset: read a header, view one tensor, write a file tensor by tensor.

The ``safetensors`` library loads and saves whole files; ONNX external data needs the byte range of
each tensor, and a 41 GB export may never hold more than a piece of one. The format is
eight bytes of header length, a JSON header, then the tensors back to back
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimg.engines.dtypes import BY_NAME, BY_SAFETENSORS
from zimg.engines.errors import ZimgError

MAX_HEADER = 100_000_000
"""The format's own bound on the header, in bytes."""


class SafetensorsError(ZimgError):
    """A file is not the safetensors file it should be."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its file, the absolute byte offset and length in it, element type and shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Map the names in a safetensors file to where their tensors lie, in file order.

    Raises:
        SafetensorsError: the file is missing, truncated, or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise SafetensorsError(f"{path} is no safetensors file, or was cut short", _kind_hint(prefix))
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise SafetensorsError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise SafetensorsError(f"{path} has no readable safetensors header ({error})", "fetch the file again") from None
    if not isinstance(header, dict):
        raise SafetensorsError(f"{path} has no readable safetensors header (not an object)", "fetch the file again")
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensors[name] = _entry(path, name, entry, 8 + length)
    end = max((info.offset + info.nbytes for info in tensors.values()), default=8 + length)
    if end > size:
        raise SafetensorsError(f"{path} is cut short: {size:,} of {end:,} bytes", "fetch the file again")
    return tensors


def _kind_hint(prefix: bytes) -> str:
    if prefix[:2] == b"PK" or prefix[:1] == b"\x80":
        return "it looks like a pickle (.bin, .pt, .ckpt), which zimg never opens: convert it to safetensors"
    return "fetch the file again"


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype = BY_SAFETENSORS[entry["dtype"]]
        shape = tuple(int(side) for side in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise SafetensorsError(f"{path}: tensor {name!r} has a header zimg cannot read ({error!r})") from None
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * dtype.storage.itemsize:
        raise SafetensorsError(f"{path}: tensor {name!r} has {end - begin} bytes, which do not fit its shape {shape}")
    return TensorInfo(path, name, dtype.name, shape, start + begin, end - begin)


def view(info: TensorInfo) -> NDArray[Any]:
    """Map one tensor into memory, read-only, in its storage type (bfloat16 as uint16); nothing is read yet."""
    storage = BY_NAME[info.dtype].storage
    if info.nbytes == 0:
        return np.empty(info.shape, storage)
    raw = np.memmap(info.file, np.uint8, "r", info.offset, (info.nbytes,))
    return raw.view(storage).reshape(info.shape)


def layout(
    path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Plan a file of tensors given as name -> (dtype name, shape): its header bytes, and where each will lie.

    Wide element types come first, so that every tensor is aligned to its own size.
    """
    ordered = sorted(tensors, key=lambda name: -BY_NAME[tensors[name][0]].storage.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in ordered:
        dtype, shape = BY_NAME[tensors[name][0]], list(tensors[name][1])
        end = position + math.prod(shape) * dtype.storage.itemsize
        header[name] = {"dtype": dtype.safetensors, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    return prefix, {name: _entry(path, name, header[name], len(prefix)) for name in ordered}


def write(
    path: Path,
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    pieces: Mapping[str, Iterable[NDArray[Any]]],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, TensorInfo]:
    """Write a safetensors file piece by piece, so that no tensor is ever whole in memory.

    Args:
        path: the file to write; it is overwritten.
        tensors: name -> (dtype name, shape).
        pieces: name -> arrays whose bytes, one after the other, are the tensor's, in storage type and row order.
        metadata: strings for the header's ``__metadata__``.

    Raises:
        SafetensorsError: the pieces of a tensor do not add up to its size.
        OSError: the disk is full or the file cannot be written.
    """
    prefix, infos = layout(path, tensors, metadata)
    with path.open("wb") as file:
        file.write(prefix)
        for name, info in infos.items():
            for piece in pieces[name]:
                file.write(np.ascontiguousarray(piece).data)
            if file.tell() != info.offset + info.nbytes:
                written = file.tell() - info.offset
                raise SafetensorsError(f"{path}: tensor {name!r} got {written} of {info.nbytes} bytes")
    return infos
