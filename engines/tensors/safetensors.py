"""Safetensors files by offset: read a header, view one tensor, write a file tensor by tensor.

The ``safetensors`` library loads and saves whole files; ONNX external data needs the byte range of
each tensor, and a 41 GB export may never hold more than a piece of one. The format is
eight bytes of header length, a JSON header, then the tensors back to back
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import ZimgError
from zimgkit.engines.tensors.dtypes import BY_NAME, BY_SAFETENSORS

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
    header, length, size = _read_json(path)
    infos = [_entry(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    end = 8 + length
    for info in infos:
        # The format allows neither gaps nor overlaps.
        if info.offset != end:
            message = f"{path}: tensor {info.name!r} does not begin where the one before it ends"
            raise SafetensorsError(message, "fetch the file again")
        end += info.nbytes
    if end != size:
        state = "is cut short" if end > size else "goes on after its last tensor"
        raise SafetensorsError(f"{path} {state}: {size:,} of {end:,} bytes", "fetch the file again")
    return {info.name: info for info in infos}


def read_metadata(path: Path) -> dict[str, str]:
    """The strings in a safetensors file's ``__metadata__``; what is no string is left out.

    Raises:
        SafetensorsError: the file is missing, truncated, or no safetensors file.
    """
    metadata = _read_json(path)[0].get("__metadata__")
    return {key: text for key, text in metadata.items() if isinstance(text, str)} if isinstance(metadata, dict) else {}


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, its length, and the file's size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise SafetensorsError(f"{path} is no safetensors file, or was cut short", _kind_hint(prefix))
            header = json.loads(file.read(length).decode(), object_pairs_hook=_object)
    except FileNotFoundError:
        raise SafetensorsError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SafetensorsError(f"{path} has no readable safetensors header ({error})", "fetch the file again") from None
    if not isinstance(header, dict):
        raise SafetensorsError(f"{path} has no readable safetensors header (not an object)", "fetch the file again")
    return header, length, size


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name occurs twice")
    return names


def _kind_hint(prefix: bytes) -> str:
    # A zip, or protocol 2 to 5 and an opcode. The length of a short header may begin likewise, but has a zero there.
    if re.match(rb"PK|\x80[\x02-\x05](?!\0)", prefix):
        return "it looks like a pickle (.bin, .pt, .ckpt), which zimgkit never opens: convert it to safetensors"
    if prefix == b"version ":
        return "it looks like a Git LFS pointer: fetch the file itself (git lfs pull)"
    return "fetch the file again"


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        message = f"{path}: tensor {name!r} has no readable shape and data_offsets"
        raise SafetensorsError(message, "fetch the file again")
    dtype = BY_SAFETENSORS.get(str(fields.get("dtype")))
    if dtype is None:
        known = ", ".join(BY_SAFETENSORS)
        raise SafetensorsError(f"{path}: tensor {name!r} is of type {fields.get('dtype')!r}", f"zimgkit reads {known}")
    nbytes = offsets[1] - offsets[0]
    if nbytes != math.prod(shape) * dtype.storage.itemsize:
        raise SafetensorsError(f"{path}: tensor {name!r} has {nbytes} bytes, which do not fit its shape {tuple(shape)}")
    return TensorInfo(path, name, dtype.name, tuple(shape), start + offsets[0], nbytes)


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


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
