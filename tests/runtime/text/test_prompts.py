"""Files of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from zimgkit.engines.errors import UsageError
from zimgkit.runtime.text.prompts import read_prompts


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_lines(tmp_path: Path, end: str, start: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes((start + end.join(["# a comment", "a cat", "", "  two  ", "# more", "a # b"])).encode())
    assert read_prompts(path) == ["a cat", "two", "a # b"]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_what_ends_no_line(tmp_path: Path, inside: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(f"a{inside}cat\nb".encode())
    assert read_prompts(path) == [f"a{inside}cat", "b"]


def test_no_text(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("grün".encode("utf-16"))
    with pytest.raises(UsageError, match="no text in UTF-8"):
        read_prompts(tmp_path / "p.txt")
    for missing in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_prompts(missing)
