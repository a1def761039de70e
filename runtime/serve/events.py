"""What a service tells of a request that it draws: plain data, which may come from another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Queued:
    """So many requests are before it."""

    position: int


@dataclass(frozen=True)
class Progress:
    """So many of all steps of all pictures are taken."""

    steps: int
    total: int


@dataclass(frozen=True)
class Preview:
    """What a picture would be now."""

    picture: int
    file: bytes = field(repr=False)


@dataclass(frozen=True)
class Finished:
    """A picture is there."""

    picture: int
    files: tuple[bytes, ...] = field(repr=False)
    """One, or one for each layer where a picture was taken apart."""
    text: str
    """What made it, as web UIs write it."""
    usage: Mapping[str, int | Mapping[str, int]]
    """OpenAI's count of the whole request's tokens."""


Event = Queued | Progress | Preview | Finished
