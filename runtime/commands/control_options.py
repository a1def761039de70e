"""``--control`` and what is said beside it: which ControlNets act, with which pictures, how strongly and when."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from zimgkit.engines.errors import UsageError

NUMBERS = ("scale", "start", "end")
NAMED = re.compile(r"(\w+)=(.+)", re.ASCII | re.DOTALL)
OPTIONS = (
    click.option(
        "--control",
        "control_images",
        multiple=True,
        metavar="[NAME=]PICTURE[:SCALE[:START[:END]]]",
        help="A picture for a ControlNet of the bundle, how strongly that acts, and from which share of the steps to "
        "which. Repeatable. [default: at 1, from 0 to 1]",
    ),
    click.option(
        "--control-mask",
        "control_masks",
        multiple=True,
        metavar="[NAME=]MASK",
        help="A picture that is white where a ControlNet that inpaints draws anew. Repeatable.",
    ),
    click.option(
        "--control-inpaint-image",
        "control_inpaint_images",
        multiple=True,
        metavar="[NAME=]PICTURE",
        help="What such a net inpaints, where that is not its control picture. Repeatable.",
    ),
)
BESIDE = {"control_masks": "mask", "control_inpaint_images": "inpaint_image"}
"""What an option is called -> what it gives a net."""


def control_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def with_controls(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call in which what the options were given is its ``controls``.

    Raises:
        UsageError: nobody can tell which net a mask is for.
    """
    found = [_control(text) for text in call["control_images"]]
    for option, key in BESIDE.items():
        for text in call[option]:
            name, path = _named(text)
            nets = [entry for entry in found if not name or entry.get("name") in (name, None)]
            if not name and len(found) > 1:
                said = f"--{option.replace('_', '-').removesuffix('s')}"
                raise UsageError(f"{said} {text} names none of {len(found)} ControlNets", f"give {said} NAME={text}")
            if not nets:
                nets = [{"name": name} if name else {}]
                found += nets
            nets[0][key] = Path(path)
    rest = {key: value for key, value in call.items() if key not in ("control_images", *BESIDE)}
    return rest | ({"controls": found} if found else {})


def _control(text: str) -> dict[str, Any]:
    """One ``--control``: the numbers behind a colon, where no file is called so."""
    name, path = _named(text)
    numbers: list[float] = []
    while len(numbers) < len(NUMBERS) and not Path(path).exists():
        head, colon, tail = path.rpartition(":")
        try:
            numbers.insert(0, float(tail))
        except ValueError:
            break
        if not colon:
            break
        path = head
    entry = {"image": Path(path), **dict(zip(NUMBERS, numbers, strict=False))}
    return {"name": name, **entry} if name else entry


def _named(text: str) -> tuple[str, str]:
    """``NAME=PATH`` in two, where no file is called so."""
    match = NAMED.fullmatch(text)
    return ("", text) if match is None or Path(text).exists() else (match[1], match[2])
