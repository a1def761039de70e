"""Prompts in text files, one a line."""

from __future__ import annotations

import re
from pathlib import Path

from zimgkit.engines.errors import UsageError

LINE_END = re.compile(r"\r\n|\r|\n")
"""Other characters that some take for line ends stand within prompts that people paste."""
COMMENT = "#"


def read_prompts(path: Path) -> list[str]:
    """The prompts in a text file: one a line; empty lines and lines that begin with ``#`` are left out.

    Raises:
        UsageError: there is no such file, or it is no text in UTF-8.
    """
    lines = (line.strip() for line in LINE_END.split(read_text(path, "name a text file in UTF-8, one prompt a line")))
    return [line for line in lines if line and not line.startswith(COMMENT)]


def read_text(path: Path, hint: str) -> str:
    """What a text file holds, without a byte order mark.

    Args:
        path: the file.
        hint: what to do where it cannot be read.

    Raises:
        UsageError: there is no such file, or it is no text in UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{path} cannot be read (it is no text in UTF-8)", hint) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})", hint) from None
