"""Scene -> caption, in English or Chinese, in varied phrasing."""

from __future__ import annotations

import random

from zimgkit.training.world.scene import Background, Scene, Thing

_CHINESE_SHAPES = {
    "circle": "圆",
    "oval": "椭圆",
    "square": "正方形",
    "triangle": "三角形",
    "diamond": "菱形",
    "hexagon": "六边形",
    "star": "五角星",
    "heart": "心形",
    "cross": "十字",
    "ring": "圆环",
    "crescent": "月牙",
    "arrow": "箭头",
    "bolt": "闪电",
}
_SYNONYMS = {
    "circle": ("circle", "disc"),
    "oval": ("oval", "ellipse"),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus sign"),
    "crescent": ("crescent", "crescent moon"),
    "圆": ("圆", "圆形"),
    "椭圆": ("椭圆", "椭圆形"),
    "正方形": ("正方形", "方块"),
    "五角星": ("五角星", "星星"),
    "心形": ("心形", "爱心"),
    "十字": ("十字", "十字形"),
    "月牙": ("月牙", "弯月"),
}
_SYNONYM_SHARE = 0.2
_CHINESE_COLOURS = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "cyan": "青色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "brown": "棕色",
    "black": "黑色",
    "white": "白色",
    "light grey": "浅灰色",
    "light blue": "浅蓝色",
    "light green": "浅绿色",
    "cream": "米色",
    "lavender": "淡紫色",
    "dark blue": "深蓝色",
}
_CHINESE_SIZES = {None: "", "small": "小", "large": "大"}
_CHINESE_TEXTURES = {"plain": "", "striped": "条纹", "checked": "格子", "dotted": "圆点"}
_CHINESE_PLACES = {
    "centre": "中间",
    "left": "左边",
    "right": "右边",
    "top": "上方",
    "bottom": "下方",
    "top left": "左上角",
    "top right": "右上角",
    "bottom left": "左下角",
    "bottom right": "右下角",
}
_PLACES = {
    "centre": ("in the centre", "in the middle"),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "top left": ("in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}
# First and second thing of a row or a column, in the order {0}, {1} of the scene.
_PAIRS = {
    "row": (
        "{0} left of {1}",
        "{0} left of {1}",
        "{0} to the left of {1}",
        "{1} right of {0}",
        "{1} to the right of {0}",
        "{0} on the left and {1} on the right",
    ),
    "column": (
        "{0} above {1}",
        "{0} above {1}",
        "{1} below {0}",
        "{1} under {0}",
        "{0} at the top and {1} at the bottom",
    ),
}
_CHINESE_PAIRS = {
    "row": (
        "{0}在{1}的左边",
        "{0}在{1}左边",
        "{1}在{0}的右边",
        "{1}的左边有{0}",
        "{0}的右边有{1}",
        "左边是{0}，右边是{1}",
    ),
    "column": (
        "{0}在{1}的上面",
        "{0}在{1}上方",
        "{1}在{0}的下面",
        "{1}的上面有{0}",
        "{0}的下面有{1}",
        "上面是{0}，下面是{1}",
    ),
}


def caption(scene: Scene) -> str:
    """What a scene's picture is asked for with; the same for the same scene.

    >>> from zimgkit.training.world.scene import Scene, Thing
    >>> caption(Scene(128, 128, (Thing("circle", "red", 32, 64, 20), Thing("square", "blue", 96, 64, 20)), "row"))
    'a red circle left of a blue square'
    """
    rng = random.Random(scene.phrasing)  # noqa: S311
    return _chinese(scene, rng) if scene.language == "zh" else _english(scene, rng)


def noun(thing: Thing, scene: Scene) -> str:
    """One thing of a scene in the scene's language, as a caption of its own."""
    rng = random.Random(f"{scene.phrasing} {thing.shape} {thing.colour}")  # noqa: S311
    return _chinese_noun(thing, rng) if scene.language == "zh" else _noun(thing, rng)


def _pick(rng: random.Random, options: tuple[str, ...]) -> str:
    return options[int(rng.random() * len(options))]


def _word(rng: random.Random, shape: str) -> str:
    return _pick(rng, _SYNONYMS[shape]) if shape in _SYNONYMS and rng.random() < _SYNONYM_SHARE else shape


def _english(scene: Scene, rng: random.Random) -> str:
    opening = _pick(rng, ("", "", "", "", "a picture of ", "a drawing of "))
    nouns = [_noun(thing, rng) for thing in scene.things]
    text = opening + _english_things(scene, nouns, rng)
    if scene.background.told:
        joint = _pick(rng, (" on ", " on ", " against "))
        text += joint + _ground(scene.background)
    return text


def _noun(thing: Thing, rng: random.Random) -> str:
    words = " ".join(word for word in (thing.size, thing.colour, _word(rng, thing.shape)) if word)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _english_things(scene: Scene, nouns: list[str], rng: random.Random) -> str:
    first, *more = nouns
    if scene.writing:
        where, text = ("below", scene.writing.text) if scene.writing.below else ("above", scene.writing.text)
        other = "above" if scene.writing.below else "below"
        forms = (f'{first} with the word "{text}" {where} it', f'{first} {other} the word "{text}"')
        return _pick(rng, forms)
    if not more:
        return f"{first} {_pick(rng, _PLACES[scene.place])}" if scene.place else first
    if len(more) == 1 and scene.arrangement_told:
        return _pick(rng, _PAIRS[scene.arrangement or "row"]).format(*nouns)
    if not scene.arrangement_told:
        rng.shuffle(nouns)
    listed = f"{', '.join(nouns[:-1])} and {nouns[-1]}"
    if not scene.arrangement_told:
        return listed
    order = "from left to right" if scene.arrangement == "row" else "from top to bottom"
    return _pick(rng, (f"{listed} {order}", f"{listed}, {order}"))


def _ground(background: Background) -> str:
    if background.texture == "gradient":
        return f"a gradient background from {background.ground} to {background.other}"
    texture = "" if background.texture == "plain" else f"{background.texture} "
    return f"a {texture}{background.ground} background"


def _chinese(scene: Scene, rng: random.Random) -> str:
    counted = "一个" if rng.random() < 0.3 else ""
    nouns = [counted + _chinese_noun(thing, rng) for thing in scene.things]
    text = _chinese_things(scene, nouns, rng)
    if scene.background.told:
        ground = _chinese_ground(scene.background)
        text = _pick(rng, (f"{ground}上，{text}", f"{text}，{ground}"))
    return text


def _chinese_noun(thing: Thing, rng: random.Random) -> str:
    shape = _word(rng, _CHINESE_SHAPES[thing.shape])
    return f"{_CHINESE_COLOURS[thing.colour]}的{_CHINESE_SIZES[thing.size]}{shape}"


def _chinese_things(scene: Scene, nouns: list[str], rng: random.Random) -> str:
    first, *more = nouns
    if scene.writing:
        where = "下面" if scene.writing.below else "上面"
        return _pick(rng, (f"{first}，{where}写着“{scene.writing.text}”", f"{first}{where}有“{scene.writing.text}”"))
    if not more:
        if not scene.place:
            return first
        place = _CHINESE_PLACES[scene.place]
        return _pick(rng, (f"{first}在{place}", f"{place}有{first}"))
    if len(more) == 1 and scene.arrangement_told:
        return _pick(rng, _CHINESE_PAIRS[scene.arrangement or "row"]).format(*nouns)
    if not scene.arrangement_told:
        rng.shuffle(nouns)
    listed = f"{'、'.join(nouns[:-1])}和{nouns[-1]}"
    if not scene.arrangement_told:
        return listed
    return f"{'从左到右' if scene.arrangement == 'row' else '从上到下'}是{listed}"


def _chinese_ground(background: Background) -> str:
    ground = _CHINESE_COLOURS[background.ground]
    if background.texture == "gradient":
        return f"从{ground}到{_CHINESE_COLOURS[background.other or background.ground]}的渐变背景"
    return f"{ground}{_CHINESE_TEXTURES[background.texture]}背景"
