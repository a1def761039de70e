"""Damage to files: what a file may have become on its way, or in the hands of somebody who means no good."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

VALUES = (
    *('""', '"x"', '"3.0"', '"\\u0000"', '"\\ud800"', '"../../x"', "null", "true", "false"),
    *("0", "-1", "3", "1.5", "-1e-320", "1e308", "1e400", "NaN", "-Infinity", "4294967296", str(2**62), "9" * 5000),
    *("[]", "[1]", '["x"]', "[null, -1, 1e9]", "{}", '{"x": 1}', '{"": {}}', "[" * 10_000 + "]" * 10_000),
)
"""What may stand in the place of a JSON value."""
LEFT_OUT, TWICE = OTHER = ("left out", "twice")
MARK = "the mark of a mutation"


def of_json(text: str, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Values of a document replaced by some of :data:`VALUES`, left out, or given twice.

    Args:
        text: the document.
        seed: of the choices.
        count: how many, of all there are at most.

    Yields:
        What was done, and the damaged text.
    """
    document = json.loads(text)
    every = list(itertools.product(_places(document), (*VALUES, *OTHER)))
    for place, value in random.Random(seed).sample(every, min(count, len(every))):
        name = ".".join(map(str, place))
        if not place or value not in OTHER:
            yield f"{name} = {value[:20]}", _with(text, place, value)
        elif value is LEFT_OUT:
            yield f"{name} {value}", _with(text, place, None)
        elif isinstance(place[-1], str):
            yield f"{name} {value}", _with(text, place, f'0, {json.dumps(place[-1])}: "x"')


def of_bytes(data: bytes, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Bits flipped, pieces cut out, overwritten or repeated, the end missing, other encodings.

    Args:
        data: the file.
        seed: of the choices.
        count: how many of each kind.

    Yields:
        What was done, and the damaged bytes.
    """
    rng = random.Random(seed)
    fixed = {"empty": b"", "a BOM": b"\xef\xbb\xbf" + data, "UTF-16": data.decode("latin-1").encode("utf-16")}
    fixed |= {"no UTF-8": b"\xff\xfe" + data, "zeros": bytes(len(data[:10_000])), "twice": data + data}
    yield from fixed.items()
    for _ in range(count):
        at = rng.randrange(len(data))
        yield f"bit of {at}", data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        yield f"cut at {at}", data[:at]
        length = rng.randrange(1, 9)
        yield f"noise at {at}", data[:at] + rng.randbytes(length) + data[at + length :]
        yield f"{length} bytes missing at {at}", data[:at] + data[at + length :]


def _places(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield place
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from _places(entry, (*place, key))


def _with(text: str, place: tuple[str | int, ...], value: str | None) -> bytes:
    """A document with a text in the place of a value; without the value where None."""
    if not place:
        return (value or "").encode()
    document = holder = json.loads(text)
    for key in place[:-1]:
        holder = holder[key]
    if value is None:
        del holder[place[-1]]
        return json.dumps(document).encode()
    holder[place[-1]] = MARK
    return json.dumps(document).replace(f'"{MARK}"', value).encode()
