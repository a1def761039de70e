"""Amounts of memory, read and written."""

from __future__ import annotations

import re
from fractions import Fraction

from zimgkit.engines.errors import UsageError

UNITS = {"": 1, "B": 1} | {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}
# As systemd, Docker and Java count a letter alone.
UNITS |= {f"{letter}{end}": 1024**power for power, letter in enumerate("KMGT", 1) for end in ("", "IB")}
LIMIT = 1 << 63
"""The first amount that no one means."""


def parse_bytes(text: str) -> int:
    """Parse an amount of memory such as ``"8GB"``, ``"512MiB"`` or ``"8192M"``.

    Raises:
        UsageError: the text is not a number with a unit from B to TiB, or is 2^63 bytes or more.
    """
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)\s*([KMGT]?(?:I?B)?)", text.strip().upper())
    amount = int(Fraction(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else LIMIT
    if amount >= LIMIT:
        raise UsageError(f"{text!r} is no amount of memory", "give bytes, such as 8GB or 512MiB")
    return amount


def parse_budget(value: str | int | None, free: int) -> int | None:
    """A budget of memory: an amount, or a share of what is free such as ``"50%"``.

    Args:
        value: an amount in bytes or as text; ``"auto"`` or None for no budget of one's own.
        free: bytes that are free.

    Returns:
        Bytes; None where none is given.

    Raises:
        UsageError: it is none of these, or nothing at all.
    """
    hint = "give an amount such as 8GB or 512MiB, a share of what is free such as 50%, or auto"
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UsageError(f"memory is {value!r}", hint)
    text = str(value).strip()
    if text.lower() == "auto":
        return None
    share = re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?)\s*%", text)
    if share and 0 < float(share[1]) <= 100:
        return int(free * float(share[1]) / 100)
    try:
        amount = 0 if share else parse_bytes(text)
    except UsageError:
        amount = 0
    if amount <= 0:
        raise UsageError(f"memory is {value!r}", hint)
    return amount


def gigabytes(amount: int) -> str:
    """An amount for people, such as ``"7.8 GB"``; less than one in megabytes."""
    return f"{amount / 1e9:.1f} GB" if amount >= 10**9 else f"{amount / 1e6:.0f} MB"
