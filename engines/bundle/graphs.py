"""Which byte ranges of weight files an ONNX graph points into, read without any library, and moved elsewhere.

An ONNX file is one message of protobuf: fields of a number and a wire type, some of which are messages again
(https://protobuf.dev/programming-guides/encoding, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Kind = dict[int, Any]
"""Field number -> the kind of message that lies there; of a tensor nothing is listed."""
TENSOR: Kind = {}
SPARSE: Kind = {1: TENSOR, 2: TENSOR}
GRAPH: Kind = {5: TENSOR, 15: SPARSE}
ATTRIBUTE: Kind = {5: TENSOR, 6: GRAPH, 10: TENSOR, 11: GRAPH, 22: SPARSE, 23: SPARSE}
NODE: Kind = {5: ATTRIBUTE}
GRAPH[1] = NODE
FUNCTION: Kind = {7: NODE, 11: ATTRIBUTE}
MODEL: Kind = {7: GRAPH, 20: {1: GRAPH, 2: GRAPH}, 25: FUNCTION}
NAME, EXTERNAL_DATA = 8, 13
"""Fields of a tensor; each of the latter is one of its key and value, by the numbers 1 and 2."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
DEEPEST = 40
"""How many messages lie within each other; a graph within a graph is three."""


class External(NamedTuple):
    """A tensor that lies in another file."""

    name: str
    location: str
    """The file, relative to the graph's folder."""
    offset: int
    length: int | None


def with_locations(graph: bytes, place: Callable[[External], str]) -> bytes:
    """A graph whose external tensors lie in other files; it itself, where none of them changed.

    Args:
        graph: an ONNX file's bytes.
        place: called with each external tensor, wherever in the graph; gives its file.

    Raises:
        ValueError: it is no ONNX graph, or a tensor's place cannot be read.
    """
    return _message(graph, MODEL, place, 0)


def _message(data: bytes, kind: Kind, place: Callable[[External], str], depth: int) -> bytes:
    if kind is TENSOR:
        return _tensor(data, place)
    if depth > DEEPEST:
        raise ValueError("its graphs lie too deep within each other")
    parts, copied = [], 0
    for number, start, value, end in _fields(data):
        if number in kind and isinstance(value, slice):
            old = data[value]
            new = _message(old, kind[number], place, depth + 1)
            if new is not old:
                parts += [data[copied:start], _field(number, new)]
                copied = end
    return b"".join((*parts, data[copied:])) if parts else data


def _tensor(data: bytes, place: Callable[[External], str]) -> bytes:
    name, entries, kept = "", {}, []
    for number, start, value, end in _fields(data):
        if number == EXTERNAL_DATA and isinstance(value, slice):
            pair = {
                key: _text(data[value][part]) for key, _, part, _ in _fields(data[value]) if isinstance(part, slice)
            }
            entries[pair.get(1, "")] = pair.get(2, "")
            continue
        if number == NAME and isinstance(value, slice):
            name = _text(data[value])
        kept.append(slice(start, end))
    if not entries:
        return data
    length = entries.get("length")
    found = External(
        name,
        entries.get("location", ""),
        _count(entries.get("offset", "0")),
        None if length is None else _count(length),
    )
    location = place(found)
    if location == found.location:
        return data
    pairs = (_field(1, _raw(key)) + _field(2, _raw(text)) for key, text in (entries | {"location": location}).items())
    return b"".join((*(data[part] for part in kept), *(_field(EXTERNAL_DATA, pair) for pair in pairs)))


def _fields(data: bytes) -> Iterator[tuple[int, int, slice | None, int]]:
    """Of each field of a message: its number, where it starts, where its bytes lie if it has any, and where it ends."""
    position, size = 0, len(data)
    while position < size:
        start = position
        tag, position = _varint(data, position)
        wire, value = tag & 7, None
        if wire == BYTES:
            length, position = _varint(data, position)
            value = slice(position, position + length)
            position += length
        elif wire == VARINT:
            _, position = _varint(data, position)
        elif wire in (FIXED32, FIXED64):
            position += 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"it has a field of wire type {wire}")
        if position > size:
            raise ValueError("it is cut short")
        yield tag >> 3, start, value, position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    value = shift = 0
    while shift < 70:
        if position >= len(data):
            raise ValueError("it is cut short")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise ValueError("a number in it is too long")


def _field(number: int, value: bytes) -> bytes:
    return _number(number << 3 | BYTES) + _number(len(value)) + value


def _number(value: int) -> bytes:
    groups = bytearray()
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes((*groups, value))


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ValueError(f"{text[:20]!r} is no place in a file")
    return int(text)


def _text(value: bytes) -> str:
    return os.fsdecode(value)


def _raw(text: str) -> bytes:
    return os.fsencode(text)
