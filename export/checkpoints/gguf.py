"""GGUF files: quantized tensors in blocks, as llama.cpp, stable-diffusion.cpp and ComfyUI-GGUF have them.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read here, so that nothing in it is believed
before it is checked; blocks are multiplied out by llama.cpp's own package ``gguf``, when rows of them are read.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import CheckpointError, install
from zimgkit.engines.tensors.safetensors import TensorInfo
from zimgkit.export.checkpoints.llama_cpp import joined
from zimgkit.export.checkpoints.stored import Decoded, Integers, Stored, part_of, row_width

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""Type of a value -> how :mod:`struct` calls it."""
STRING, ARRAY = 8, 9
DEEPEST = 4
"""How many arrays lie within each other."""
MOST_DIMENSIONS = 4
SHORT = 16
"""Arrays that are longer are read over."""
ENTRY, FIELD = 24, 13
"""Bytes that an entry of a tensor, or of a value, has at least."""
ALIGNMENT = 32
SHAPE_OF = "comfy.gguf.orig_shape."
"""What keys begin with that hold a tensor's shape, where the file has another one for the sake of its blocks."""
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""GGUF's types that are element types -> those."""
STEP = 1 << 20
"""Elements that are multiplied out at a time."""


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself."""

    values: Mapping[str, Any]
    """Its numbers, texts, and short arrays."""
    tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]]
    """Name -> type, shape as PyTorch has it, offset in the file, bytes."""


def read_gguf(path: Path) -> dict[str, Stored]:
    """The tensors of a GGUF file, by their names there.

    Args:
        path: the file.

    Returns:
        Each decoded when it is read: to float32 where it is quantized. What llama.cpp cuts apart is joined.

    Raises:
        CheckpointError: the package is missing, or the file is cut short, broken, or of types that cannot be decoded.
    """
    found: dict[str, Stored] = {}
    header = read_gguf_header(path)
    for name, (kind, stored, offset, size) in header.tensors.items():
        shape = _original_shape(header, name, stored, path)
        if dtype := PLAIN.get(kind):
            found[name] = part_of(TensorInfo(path, name, dtype, shape, offset, size), name, shape)
        else:
            raw = TensorInfo(path, name, "uint8", (size,), offset, size)
            width = row_width(shape)
            integers = _four_bits(raw, width) if kind == "Q4_0" and len(shape) == 2 else None
            found[name] = Decoded(name, "float32", shape, (raw,), partial(_rows, raw, kind, width), kind, integers)
    return joined(found)


def read_gguf_header(path: Path) -> Header:
    """Read and check a header; the errors are those of :func:`read_gguf`."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})", "check the file and its rights") from None


class _Reader:
    """Goes through a header from its beginning."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def header(self) -> Header:
        self._at = len(MAGIC)
        (version,) = self._numbers("I")
        if version not in VERSIONS:
            raise self._broken(f"has version {version}", f"zimgkit reads versions {' and '.join(map(str, VERSIONS))}")
        tensors, values = self._numbers("QQ")
        self._check_count(tensors, ENTRY, "tensors")
        self._check_count(values, FIELD, "values")
        known = dict(self._value() for _ in range(values))
        entries = [self._entry() for _ in range(tensors)]
        alignment = known.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self._broken(f"has an alignment of {alignment!r}")
        start = -(-self._at // alignment) * alignment
        found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for name, kind, shape, offset in entries:
            if name in found:
                raise self._broken(f"has two tensors {name!r}")
            found[name] = (kind, shape, start + offset, self._size(name, kind, shape))
        self._check_places(found)
        return Header(known, found)

    def _value(self) -> tuple[str, Any]:
        key = self._text()
        (kind,) = self._numbers("I")
        return key, self._content(kind, 0)

    def _content(self, kind: int, depth: int) -> Any:
        if kind in NUMBERS:
            return self._numbers(NUMBERS[kind])[0]
        if kind == STRING:
            return self._text()
        if kind != ARRAY or depth >= DEEPEST:
            raise self._broken(f"has a value of type {kind}")
        inner, count = self._numbers("IQ")
        if inner in NUMBERS:
            size = struct.calcsize(NUMBERS[inner])
            self._check_count(count, size, "numbers")
            if count <= SHORT:
                return list(self._numbers(f"{count}{NUMBERS[inner]}"))
            self._at += size * count
            return None
        self._check_count(count, 8, "entries")
        items = (self._content(inner, depth + 1) for _ in range(count))
        if count <= SHORT:
            return [*items]
        for _ in items:
            pass
        return None

    def _entry(self) -> tuple[str, str, tuple[int, ...], int]:
        name = self._text()
        (count,) = self._numbers("I")
        if not 0 <= count <= MOST_DIMENSIONS:
            raise self._broken(f"says that {name!r} has {count} dimensions")
        shape = self._numbers(f"{count}Q")[::-1]
        kind, offset = self._numbers("IQ")
        return name, _type_name(kind, name, self._path), shape, offset

    def _size(self, name: str, kind: str, shape: tuple[int, ...]) -> int:
        block, size = _block(kind)
        elements = math.prod(shape)
        if elements % block or (shape and shape[-1] % block):
            raise self._broken(f"says that {name!r} is of shape {shape}, which blocks of {block} ({kind}) do not fill")
        return elements // block * size

    def _check_places(self, tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]]) -> None:
        end, last = 0, ""
        for name, (_, _, offset, size) in sorted(tensors.items(), key=lambda entry: (entry[1][2], entry[1][3])):
            if offset < end:
                raise self._broken(f"says that {name!r} lies in {last!r}")
            end, last = offset + size, name
            if end > len(self._data):
                hint = "it is cut short: fetch the file again"
                raise self._broken(f"has {len(self._data):,} bytes, and {name!r} ends at {end:,}", hint)

    def _check_count(self, count: int, size: int, what: str) -> None:
        if count * size > len(self._data) - self._at:
            raise self._broken(f"says that it has {count:,} {what}, for which it is too short")

    def _text(self) -> str:
        (length,) = self._numbers("Q")
        self._check_count(length, 1, "bytes of text")
        self._at += length
        return self._data[self._at - length : self._at].decode(errors="replace")

    def _numbers(self, kinds: str) -> tuple[Any, ...]:
        kinds = f"<{kinds}"
        size = struct.calcsize(kinds)
        if self._at + size > len(self._data):
            raise self._broken("ends within its header")
        self._at += size
        return struct.unpack_from(kinds, self._data, self._at - size)

    def _broken(self, what: str, hint: str = "it is damaged: fetch the file again") -> CheckpointError:
        return CheckpointError(f"{self._path} (GGUF) {what[:300]}", hint)


def _original_shape(header: Header, name: str, stored: tuple[int, ...], path: Path) -> tuple[int, ...]:
    """A tensor's shape before its rows were cut to fit blocks."""
    given = header.values.get(SHAPE_OF + name)
    if given is None:
        return stored
    if not isinstance(given, list) or not all(isinstance(n, int) and n > 0 for n in given):
        raise CheckpointError(
            f"{path} (GGUF) gives {name!r} the shape {given!r}", "it is damaged: fetch the file again"
        )
    if math.prod(given) != math.prod(stored):
        raise CheckpointError(f"{path} (GGUF) gives {name!r} the shape {tuple(given)}, and stores {stored}")
    return tuple(given)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise CheckpointError("reading GGUF files needs the gguf package", install("export")) from None
    return gguf


def _block(kind: str) -> tuple[int, int]:
    """How many elements of a type make a block, and how many bytes that has."""
    gguf = _package()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(block), int(size)


def _type_name(number: int, name: str, path: Path) -> str:
    """What a type is called that can be decoded."""
    gguf = _package()
    known = {int(kind): kind for kind in gguf.GGMLQuantizationType}
    kind = known.get(number)
    if kind is None or (kind.name not in PLAIN and kind not in gguf.quants._type_traits):
        called = f"as {kind.name}" if kind else f"in type {number}"
        raise CheckpointError(
            f"{path} (GGUF) holds {name!r} {called}, which cannot be multiplied out",
            "name a file of another kind, such as Q8_0 or Q4_K_M",
        )
    return str(kind.name)


def _rows(raw: TensorInfo, kind: str, width: int, start: int, stop: int) -> NDArray[np.float32]:
    """Some rows of a quantized tensor in float32; a row need not begin where a block does."""
    block, size = _block(kind)
    begin, end = start * width, stop * width
    first, last = begin // block, -(-end // block)
    made = np.empty((last - first) * block, np.float32)
    done = 0
    for piece in _blocks(raw, first, last, size, max(1, STEP // block)):
        values = _dequantize(piece, kind).reshape(-1)
        made[done : done + values.size] = values
        done += values.size
    skipped = begin - first * block
    return made[skipped : skipped + end - begin].reshape(stop - start, width)


def _four_bits(raw: TensorInfo, width: int) -> Integers | None:
    """The integers of Q4_0, about 8, and the scales of their blocks; None where a block lies in two rows.

    A block is its scale in float16, then 16 bytes: the low nibbles are its first half.
    """
    block, size = _block("Q4_0")
    if width % block:
        return None
    count = width // block

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        return np.concatenate([*_blocks(raw, start * count, stop * count, size, STEP)])

    def rows(start: int, stop: int) -> NDArray[np.int8]:
        packed = read(start, stop)[:, 2:]
        values = np.concatenate([packed & 15, packed >> 4], axis=1).view(np.int8) - np.int8(8)
        return values.reshape(stop - start, width)

    def scales(start: int, stop: int) -> NDArray[np.float32]:
        found = np.ascontiguousarray(read(start, stop)[:, :2]).view("<f2")
        return found.astype(np.float32).reshape(stop - start, count)

    return Integers(4, count, rows, scales)


def _blocks(raw: TensorInfo, first: int, last: int, size: int, step: int) -> Iterator[NDArray[np.uint8]]:
    for start in range(first, last, step):
        stop = min(start + step, last)
        piece = np.fromfile(raw.file, np.uint8, (stop - start) * size, offset=raw.offset + start * size)
        if piece.size < (stop - start) * size:
            raise OSError(f"{raw.file} ended early")
        yield piece.reshape(-1, size)


def _dequantize(blocks: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    gguf = _package()
    with np.errstate(all="ignore"):  # What is not finite is found in the result.
        found: NDArray[np.float32] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    return found
