"""Pictures show what the scene says: areas by geometry, colours by name."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from zimgkit.training.judge import to_lab
from zimgkit.training.world import words
from zimgkit.training.world.drawing import COLOURS, GROUNDS, draw
from zimgkit.training.world.sampling import sample
from zimgkit.training.world.scene import Background, Scene, Thing, Writing

AREAS = {
    "circle": math.pi,
    "oval": 0.62 * math.pi,
    "square": 4,
    "triangle": math.sqrt(3),
    "diamond": 2 * 0.68,
    "hexagon": 1.5 * math.sqrt(3),
    "cross": 4 * (1 - (1 - 0.34) ** 2),
    "ring": math.pi * (1 - 0.55**2),
}
"""Of shapes whose bounding box's longer half side is one."""


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(draw(scene), np.float64)


def coverage(scene: Scene, colour: str = "black") -> np.ndarray:
    """The share of each pixel that is not the white background."""
    return (255 - pixels(scene)[..., 0]) / (255 - COLOURS[colour][0])


@pytest.mark.parametrize("shape", AREAS)
@pytest.mark.parametrize("radius", [15.3, 24.0, 40.7])
def test_areas(shape: str, radius: float) -> None:
    thing = Thing(shape, "black", 63.2, 60.9, radius)
    assert coverage(Scene(128, 128, (thing,))).sum() == pytest.approx(AREAS[shape] * radius**2, rel=0.03)


@pytest.mark.parametrize("shape", words.SHAPES)
def test_the_bounding_box_is_where_the_scene_says(shape: str) -> None:
    for seed in range(10):
        x, y, radius = np.random.default_rng(seed).uniform((45, 45, 14), (80, 80, 40))
        inside = coverage(Scene(160, 128, (Thing(shape, "black", x, y, radius),))) > 0.4
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        assert (columns[0] + columns[-1] + 1) / 2 == pytest.approx(x, abs=1)
        assert (rows[0] + rows[-1] + 1) / 2 == pytest.approx(y, abs=1)
        # Tips are thinner than a pixel.
        longer = max(np.ptp(rows), np.ptp(columns)) + 1
        assert 2 * radius - 4 < longer < 2 * radius + 1.5


@pytest.mark.parametrize("shape", words.SHAPES)
def test_edges_are_smooth(shape: str) -> None:
    share = coverage(Scene(128, 128, (Thing(shape, "black", 64.3, 64.4, 30.2),)))
    assert 40 < ((share > 0.05) & (share < 0.95)).sum() < 600


@pytest.mark.parametrize("colour", words.COLOURS)
@pytest.mark.parametrize("ground", words.GROUNDS)
def test_colours(colour: str, ground: str) -> None:
    image = pixels(Scene(128, 144, (Thing("square", colour, 64, 72, 20),), background=Background("plain", ground)))
    assert image.shape == (144, 128, 3)
    assert tuple(image[72, 64]) == COLOURS[colour]
    assert tuple(image[5, 5]) == GROUNDS[ground]


def test_colours_are_well_apart() -> None:
    """In CIELAB, from each other and from the backgrounds they come on."""
    lab = {name: to_lab(np.array(rgb, np.float64)) for name, rgb in (COLOURS | GROUNDS).items()}
    for one, other in combinations(COLOURS, 2):
        assert np.linalg.norm(lab[one] - lab[other]) > 40, (one, other)
    for seed in range(2000):
        scene = sample(seed)
        for thing in scene.things:
            for ground in filter(None, (scene.background.ground, scene.background.other)):
                assert np.linalg.norm(lab[thing.colour] - lab[ground]) > 30, (thing.colour, ground)


@pytest.mark.parametrize("texture", ["striped", "checked", "dotted"])
@pytest.mark.parametrize("ground", words.GROUNDS)
def test_textures_are_two_shades(texture: str, ground: str) -> None:
    empty = pixels(Scene(128, 128, (), background=Background(texture, ground)))
    shades, counts = np.unique(empty.reshape(-1, 3), axis=0, return_counts=True)
    common = shades[counts > 0.1 * counts.sum()]
    assert len(common) == 2
    assert 10 < np.abs(common[0] - common[1]).max() < 30
    assert GROUNDS[ground] in {tuple(shade) for shade in common}


def test_gradients_go_from_one_colour_to_the_other() -> None:
    empty = pixels(Scene(160, 128, (), background=Background("gradient", "white", "light blue")))
    assert tuple(empty[0, 0]) == GROUNDS["white"]
    assert tuple(empty[-1, 0]) == GROUNDS["light blue"]
    assert (np.diff(empty, axis=0) <= 0).all()
    assert (np.diff(empty, axis=1) == 0).all()


@pytest.mark.parametrize("text", words.WRITINGS)
@pytest.mark.parametrize("below", [True, False])
def test_words_are_written(text: str, below: bool) -> None:
    share = coverage(Scene(128, 160, (), writing=Writing(text, below)))
    rows, columns = np.flatnonzero((share > 0.5).any(1)), np.flatnonzero((share > 0.5).any(0))
    assert np.ptp(rows) == pytest.approx(20, abs=3)
    assert 4 < columns[0] < columns[-1] < 124
    assert (rows.mean() > 115) == below
    assert (rows.mean() < 45) == (not below)
    # As many gaps between letters as there should be, but for letters that lean over each other.
    assert (np.diff(columns) > 1).sum() == len(text) - 1


def test_the_same_scene_is_the_same_picture() -> None:
    for seed in range(100):
        scene = sample(seed)
        image = draw(scene)
        assert image.size == (scene.width, scene.height)
        assert image.mode == "RGB"
        assert image.tobytes() == draw(replace(scene, language="zh", phrasing=1)).tobytes()


@pytest.mark.parametrize("shape", words.SHAPES)
def test_outlines_are_lines_along_the_edge_within_the_shape(shape: str) -> None:
    scene = Scene(128, 128, (Thing(shape, "black", 64, 64, 40),))
    filled = coverage(scene) > 0.5
    lines = (255 - np.asarray(draw(scene, outlined=True), np.float64)[..., 0]) / (255 - COLOURS["black"][0]) > 0.5
    assert not (lines & ~filled).any()
    inner = filled.copy()
    for _ in range(2):  # Two pixels from the edge it is still line; ten from it, no more.
        inner[1:-1, 1:-1] &= inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    assert lines[filled & ~inner].mean() > 0.98
    for _ in range(8):
        inner[1:-1, 1:-1] &= inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
    assert not (lines & inner).any()


def test_the_concept_is_a_shape_of_its_own() -> None:
    thing = Thing(words.CONCEPT, "black", 64, 64, 40)
    bolt = coverage(Scene(128, 128, (thing,))) > 0.5
    for shape in words.SHAPES:
        other = coverage(Scene(128, 128, (replace(thing, shape=shape),))) > 0.5
        assert (bolt & other).sum() / (bolt | other).sum() < 0.6, shape
