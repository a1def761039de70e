"""Scenes from seeds: the same again, well laid out, and two splits that share no combination."""

from __future__ import annotations

from itertools import combinations

import pytest

from zimgkit.engines.errors import UsageError
from zimgkit.training.world import words
from zimgkit.training.world.captions import caption
from zimgkit.training.world.sampling import SIZES, held_out, sample
from zimgkit.training.world.scene import Scene

TRAIN = [sample(seed) for seed in range(6000)]
TEST = [sample(seed, "test") for seed in range(2000)]

Name = tuple[str, str]


def names(scene: Scene) -> list[Name]:
    return [(thing.shape, thing.colour) for thing in scene.things]


def pairs(scene: Scene) -> set[tuple[Name, str | None, Name]]:
    return {(a, scene.arrangement, b) for a, b in combinations(names(scene), 2)}


def test_a_seed_is_a_scene() -> None:
    assert [sample(seed) for seed in range(50)] == TRAIN[:50]
    assert len(set(TRAIN)) == len(TRAIN)
    assert not set(TRAIN) & set(TEST)


def test_what_a_test_shows_was_never_trained_on() -> None:
    trained = {name for scene in TRAIN for name in names(scene)}
    trained_pairs = {pair for scene in TRAIN for pair in pairs(scene)}
    for scene in TEST:
        assert not trained.issuperset(names(scene)) or not trained_pairs.issuperset(pairs(scene)), scene


def test_both_kinds_of_combinations_are_held_out() -> None:
    trained = {name for scene in TRAIN for name in names(scene)}
    every = {(shape, colour) for shape in words.SHAPES for colour in words.COLOURS}
    assert len(every - trained) == 16
    assert {name for scene in TEST if len(scene.things) == 1 for name in names(scene)} == every - trained
    assert any(trained.issuperset(names(scene)) for scene in TEST), "pairs of things that were trained on singly"


@pytest.mark.parametrize("index", [0, 1], ids=["shapes", "colours"])
def test_training_lacks_no_word(index: int) -> None:
    for word in (words.SHAPES, words.COLOURS)[index]:
        shown = {name for scene in TRAIN for name in names(scene) if name[index] == word}
        kept = {name for scene in TEST if len(scene.things) == 1 for name in names(scene) if name[index] == word}
        assert len(shown) >= 8, word
        assert 1 <= len(kept) <= 2, word


@pytest.mark.parametrize("split", ["train", "test"])
def test_splits_hold_all_sorts(split: str) -> None:
    scenes = TRAIN if split == "train" else TEST
    assert {(scene.width, scene.height) for scene in scenes} == set(SIZES)
    assert {scene.place for scene in scenes} == {*words.PLACES, None}
    assert {scene.background.texture for scene in scenes} == set(words.TEXTURES)
    assert {scene.background.ground for scene in scenes} == set(words.GROUNDS)
    assert {scene.writing.text for scene in scenes if scene.writing} == set(words.WRITINGS)
    assert {thing.size for scene in scenes for thing in scene.things} == {*words.SIZES, None}
    for share, kind in ((0.3, 1), (0.3, 2), (0.1, 3)):
        assert sum(len(scene.things) == kind for scene in scenes) > share * len(scenes)
    for language in ("en", "zh"):
        assert sum(scene.language == language for scene in scenes) > 0.3 * len(scenes)


def test_things_lie_in_the_picture_and_apart() -> None:
    for scene in TRAIN + TEST:
        for thing in scene.things:
            assert thing.radius + 2 < thing.x < scene.width - thing.radius - 2, scene
            assert thing.radius + 2 < thing.y < scene.height - thing.radius - 2, scene
        for first, second in combinations(scene.things, 2):
            gap = second.x - first.x if scene.arrangement == "row" else second.y - first.y
            assert gap > first.radius + second.radius + 4, scene
        assert len(set(names(scene))) == len(scene.things)


def test_what_is_not_told_is_plain_white() -> None:
    for scene in TRAIN:
        assert scene.background.told or (scene.background.texture, scene.background.ground) == ("plain", "white")


def test_a_caption_leaves_nothing_open() -> None:
    """Pictures of one size with one caption are one picture."""
    pictures: dict[tuple[str, int, int], tuple[object, ...]] = {}
    repeated = 0
    for scene in TRAIN + TEST:
        key, shown = (caption(scene), scene.width, scene.height), (set(scene.things), scene.background, scene.writing)
        repeated += key in pictures
        assert pictures.setdefault(key, shown) == shown, key
    assert repeated > 100


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("size", [(128, 128), (256, 144)])
def test_count_and_size_can_be_asked_for(count: int, size: tuple[int, int]) -> None:
    for seed in range(20):
        scene = sample(seed, "test", count=count, size=size)
        assert len(scene.things) == count
        assert (scene.width, scene.height) == size
        assert held_out(scene)


@pytest.mark.parametrize("count", [0, 4, -1])
def test_other_counts_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"^{count} things do not fit a picture"):
        sample(0, count=count)


@pytest.mark.parametrize("size", [(112, 128), (128, 130), (0, 0)])
def test_other_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="take multiples of 16 from 128"):
        sample(0, size=size)
