"""Fonts for captions: what they have, and what none has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from zimgkit.runtime.pictures import fonts
from zimgkit.runtime.pictures.sheet import compose, numbered
from zimgkit.training.world import captions

CELL = [Image.new("RGB", (128, 96), "red")]


@pytest.fixture
def no_system(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without fonts."""
    monkeypatch.setattr(fonts, "_of_the_system", lambda: ())
    fonts.runs.cache_clear()
    yield
    fonts.runs.cache_clear()


def page(caption: str) -> np.ndarray:
    return np.asarray(compose([caption], [CELL], 1))


def test_the_words_of_the_carried_models_are_shown_on_any_machine(no_system: None) -> None:
    root = Path(__file__).parents[3]
    texts = [*Path(captions.__file__).read_text("utf-8"), *(root / "docs/demo-prompts.txt").read_text("utf-8")]
    for character in {character for character in texts if ord(character) > 0x2E00}:
        ((text, font),) = fonts.runs(character, 14) or pytest.fail(character)
        assert (text, font.getname()[0]) == (character, "Droid Sans Fallback")


@pytest.mark.parametrize(
    "text",
    ["a 🔴 circle", "دائرة حمراء", "लाल वृत्त", "한국어", "𰻝", "a\u202eb", "a\x00b", "\ud800", "👨‍👩‍👧", "ก็", "\ufffe"],
)
def test_what_no_font_has_is_numbered_and_never_a_box(no_system: None, text: str) -> None:
    assert numbered(["a", text]) == {2: "prompt 2"}
    assert np.array_equal(page(text), page("prompt 1"))


@pytest.mark.parametrize(
    "text", ["a 🔴 circle", "دائرة حمراء", "लाल वृत्त", "é", "\ud800", "一" * 500, "x" * 500, "", " \n\t "]
)
def test_any_text_gives_a_page_on_this_machine(text: str) -> None:
    pixels = page(text)
    assert (pixels[:, :9] == 255).all() and (pixels[:, -9:] == 255).all()


def test_pieces_have_fonts_of_their_own(no_system: None) -> None:
    divided = fonts.runs("a 红 circle", 14) or ()
    assert [(text, font.getname()[0]) for text, font in divided] == [
        ("a ", "Aileron"), ("红", "Droid Sans Fallback"), (" circle", "Aileron")
    ]  # fmt: skip


def test_a_latin_caption_is_drawn_as_pillow_draws_it() -> None:
    from PIL import ImageDraw

    expected = page("").copy()
    drawn = Image.fromarray(expected)
    ImageDraw.Draw(drawn).text((10, 10 + 96 + 4), "a red circle", fill=(60, 60, 60), font=ImageFont.load_default(14))
    assert np.array_equal(page("a red circle"), np.asarray(drawn))


def test_broken_fonts_of_the_system_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a-sans.ttf").write_bytes(b"no font")
    (tmp_path / "b-sans.ttc").mkdir()
    (tmp_path / "c.otf").symlink_to("c.otf")
    monkeypatch.setattr(fonts, "FOLDERS", (str(tmp_path), str(tmp_path / "none")))
    fonts._of_the_system.cache_clear()
    fonts.runs.cache_clear()
    assert fonts.runs("한국어", 14) is None
    fonts._of_the_system.cache_clear()
    fonts.runs.cache_clear()
