from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.training import toy
from zimgkit.engines.errors import ZimgError
from zimgkit.runtime import demo_models
from zimgkit.training import validation
from zimgkit.training.accuracy import accuracy


def test_a_page_shows_what_a_row_gives_what_is_drawn_and_the_image(tmp_path: Path) -> None:
    data = toy.dataset(tmp_path / "data", [(128, 128)], count=1)
    validation.draw_page(demo_models.locate("zimg-tiny-z"), data, tmp_path / "page.png", ())
    page = Image.open(tmp_path / "page.png")
    assert page.size == (128 + 4, 2 * (128 + 4))
    assert page.crop((0, 132, 128, 260)).tobytes() == Image.open(data / "0.png").tobytes()
    assert len(set(page.crop((0, 0, 128, 128)).getdata())) > 100
    assert (tmp_path / "page.txt").read_text() == "一个red的square\n"


def test_the_figure_is_the_judges() -> None:
    cases = accuracy("zimg-tiny-z", captions=2)
    line = validation.judged(demo_models.locate("zimg-tiny-z"), (), 2)
    assert line == f"judge, text-to-image, 2 captions: {sum(case.right for case in cases) / 2:.1%}"


def test_what_goes_wrong_is_one_line_and_what_was_trained_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ZimgError) as error:
        validation.judged(tmp_path / "none", (), 2)
    assert "the judge failed: " in str(error.value) and "what was trained is kept" in str(error.value)
    assert "\n" not in str(error.value)
