"""Foreign data as structs: types and bounds are checked once, where the data comes in, and one line says what is wrong.

What no picture depends on is no field of a struct, and passes unread: checkpoints carry more than is known here.
"""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from zimgkit.engines.errors import ZimgError

Small = Annotated[int, msgspec.Meta(ge=1, le=1024)]
"""A number of layers, heads, channels of latents, or numbers in a head. Nothing built from bounded sizes overflows."""
Even = Annotated[int, msgspec.Meta(ge=2, le=1024, multiple_of=2)]
"""Likewise, of which there are pairs."""
Width = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
"""A number of features."""
Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
"""A number of tokens, or of entries of a vocabulary."""
Number = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
"""A finite number."""
Positive = Annotated[float, msgspec.Meta(ge=1e-12, le=1e9)]
"""A finite number above zero, of which float32 holds the reciprocal too."""

T = TypeVar("T")


def decoded(data: Any, kind: type[T], where: str, error: type[ZimgError], hint: str = "") -> T:
    """Data of unknown types as a struct.

    Args:
        data: what a JSON parser gave.
        kind: a :class:`msgspec.Struct`. Keys that it does not have are left out.
        where: how the message calls the data, such as its file.
        error: what is raised.
        hint: what to do about it.

    Raises:
        ZimgError: as ``error``: naming the first key of another type or out of its bounds, and what stands there.
    """
    try:
        return msgspec.convert(data, kind)
    except UnicodeEncodeError:
        raise error(f"{where}: a text in it has halves of surrogate pairs, which are no characters", hint) from None
    except msgspec.ValidationError as problem:
        raise error(f"{where}: {_told(str(problem), data)}", hint) from None


def read_json(path: Path, error: type[ZimgError], hint: str = "fetch the file again") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ZimgError: as ``error``: there is no such file, or it holds none.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise error(f"{path} is missing", hint) from None
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path} cannot be read ({problem})", hint) from None
    if not isinstance(found, dict):
        raise error(f"{path} is not a JSON object", hint)
    return found


def _told(problem: str, data: Any) -> str:
    """What msgspec says, with the value that it says it of: ``a.b[1] is 'x' (expected `int`, got `str`)``."""
    expected, _, path = problem.partition(" - at `$")
    path = path.strip("`.")
    missing = re.fullmatch("Object missing required field `(.+)`", expected)
    if missing:
        return f"{path + '.' if path else ''}{missing[1]} is missing"
    if not path:
        return expected
    value = data
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        value = value[int(index)] if index else value.get(name) if isinstance(value, dict) else None
    # Of a mapping, the path does not say which entry.
    stands = "" if "[...]" in path else f" is {reprlib.repr(value)}"
    return f"{path}{stands} ({expected[:1].lower()}{expected[1:]})"
