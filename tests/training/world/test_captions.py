"""Captions say what is in the scene, in both languages."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from zimgkit.training.world.captions import caption
from zimgkit.training.world.sampling import sample
from zimgkit.training.world.scene import Background, Scene, Thing, Writing

CIRCLE = Thing("circle", "red", 32, 64, 20)
SQUARE = Thing("square", "blue", 96, 64, 20)
ROW = Scene(128, 128, (CIRCLE, SQUARE), "row")
COLUMN = replace(ROW, arrangement="column")
CHINESE_COLOURS = dict(
    zip(
        ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "black"],
        ["红色", "橙色", "黄色", "绿色", "青色", "蓝色", "紫色", "粉色", "棕色", "黑色"],
        strict=True,
    )
)


def captions(scene: Scene, language: str = "en") -> set[str]:
    """All ways to say it, without articles, openings and synonyms."""
    said = {caption(replace(scene, language=language, phrasing=number)) for number in range(600)}
    simple = {re.sub(r"^a (picture|drawing) of ", "", text).replace("一个", "") for text in said}
    return {text for text in simple if not re.search("disc|圆形|方块", text)}


def test_a_pair_in_a_row() -> None:
    assert captions(ROW) == {
        "a red circle left of a blue square",
        "a red circle to the left of a blue square",
        "a blue square right of a red circle",
        "a blue square to the right of a red circle",
        "a red circle on the left and a blue square on the right",
    }
    assert captions(ROW, "zh") == {
        "红色的圆在蓝色的正方形的左边",
        "红色的圆在蓝色的正方形左边",
        "蓝色的正方形在红色的圆的右边",
        "蓝色的正方形的左边有红色的圆",
        "红色的圆的右边有蓝色的正方形",
        "左边是红色的圆，右边是蓝色的正方形",
    }


def test_a_pair_in_a_column() -> None:
    assert captions(COLUMN) == {
        "a red circle above a blue square",
        "a blue square below a red circle",
        "a blue square under a red circle",
        "a red circle at the top and a blue square at the bottom",
    }
    assert "蓝色的正方形在红色的圆的下面" in captions(COLUMN, "zh")
    assert "红色的圆在蓝色的正方形的上面" in captions(COLUMN, "zh")


def test_a_pair_whose_order_is_not_told() -> None:
    scene = replace(ROW, arrangement_told=False)
    assert captions(scene) == {"a red circle and a blue square", "a blue square and a red circle"}
    assert captions(scene, "zh") == {"红色的圆和蓝色的正方形", "蓝色的正方形和红色的圆"}


def test_three() -> None:
    scene = replace(ROW, things=(CIRCLE, SQUARE, Thing("triangle", "orange", 0, 0, 0)))
    listed = "a red circle, a blue square and an orange triangle"
    assert captions(scene) == {f"{listed} from left to right", f"{listed}, from left to right"}
    assert captions(replace(scene, arrangement="column"), "zh") == {"从上到下是红色的圆、蓝色的正方形和橙色的三角形"}


def test_one() -> None:
    one = Scene(128, 128, (replace(CIRCLE, size="small"),))
    assert captions(one) == {"a small red circle"}
    assert captions(one, "zh") == {"红色的小圆"}
    placed = replace(one, place="top left")
    assert captions(placed) == {
        "a small red circle in the top left corner",
        "a small red circle at the top left",
    }
    assert captions(placed, "zh") == {"红色的小圆在左上角", "左上角有红色的小圆"}


@pytest.mark.parametrize(
    ("background", "english", "chinese"),
    [
        (Background("plain", "cream"), "a cream background", "米色背景"),
        (Background("striped", "light blue"), "a striped light blue background", "浅蓝色条纹背景"),
        (Background("checked", "white"), "a checked white background", "白色格子背景"),
        (Background("dotted", "dark blue"), "a dotted dark blue background", "深蓝色圆点背景"),
        (
            Background("gradient", "white", "lavender"),
            "a gradient background from white to lavender",
            "从白色到淡紫色的渐变背景",
        ),
    ],
    ids=lambda value: value.texture if isinstance(value, Background) else "",
)
def test_backgrounds(background: Background, english: str, chinese: str) -> None:
    one = Scene(128, 128, (CIRCLE,), background=replace(background, told=True))
    assert captions(one) == {f"a red circle on {english}", f"a red circle against {english}"}
    assert captions(one, "zh") == {f"红色的圆，{chinese}", f"{chinese}上，红色的圆"}
    assert captions(replace(one, background=background)) == {"a red circle"}


def test_words() -> None:
    one = Scene(128, 128, (CIRCLE,), writing=Writing("CAT"))
    assert captions(one) == {'a red circle with the word "CAT" below it', 'a red circle above the word "CAT"'}
    assert captions(one, "zh") == {"红色的圆，下面写着“CAT”", "红色的圆下面有“CAT”"}
    assert 'a red circle below the word "CAT"' in captions(replace(one, writing=Writing("CAT", below=False)))


def test_every_caption_names_every_thing() -> None:
    said = set()
    for seed in range(2000):
        scene = sample(seed)
        text = caption(scene)
        assert text == caption(scene)
        said.add(text)
        assert bool(re.search("[一-鿿]", text)) == (scene.language == "zh")
        for thing in scene.things:
            assert (CHINESE_COLOURS[thing.colour] if scene.language == "zh" else thing.colour) in text
        assert not re.search(r"None|  |\ba [aeiou]|\ban [^aeiou]|的的|\{", text), text
        assert text == text.strip()
    assert len(said) > 1700
