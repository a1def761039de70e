"""The judge reads pictures that it did not draw, says yes to right ones and no to wrong ones."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from zimgkit.training import judge as judging
from zimgkit.training.judge import Counted, Placed, Present, Related, Seen, Sized, judge, look
from zimgkit.training.world.claims import claims
from zimgkit.training.world.drawing import draw
from zimgkit.training.world.sampling import sample
from zimgkit.training.world.scene import Scene
from zimgkit.training.world.words import COLOURS, PLACES, SHAPES


def clean(image: Image.Image, seed: int) -> Image.Image:
    return image


def poor(image: Image.Image, seed: int) -> Image.Image:
    """Blurred, noisy, JPEG-ed and shifted, each by chance more or less."""
    rng = np.random.default_rng(seed)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.4)))
    pixels = np.asarray(image, np.float64)
    pixels = pixels + rng.normal(0, rng.uniform(3, 12), pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=int(rng.integers(60, 90)))
    right, down = (int(step) for step in rng.integers(-3, 4, 2))
    padded = np.pad(np.asarray(Image.open(file)), ((3, 3), (3, 3), (0, 0)), mode="edge")
    height, width = padded.shape[:2]
    return Image.fromarray(padded[3 - down : height - 3 - down, 3 - right : width - 3 - right])


def other(scene: Scene, kind: str, seed: int) -> Scene:
    """The scene with one thing of another shape or colour, or with its things in reverse order."""
    rng = random.Random(seed)
    if kind == "relation":
        row = scene.arrangement == "row"
        turned = [
            replace(thing, x=scene.width - thing.x) if row else replace(thing, y=scene.height - thing.y)
            for thing in scene.things
        ]
        return replace(scene, things=tuple(turned))
    dark = {"black", "blue", "purple", "brown"} if scene.background.ground == "dark blue" else set()
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    if kind == "shape":
        thing = replace(thing, shape=rng.choice([s for s in SHAPES if s != thing.shape]))
    else:
        thing = replace(thing, colour=rng.choice([c for c in COLOURS if c != thing.colour and c not in dark]))
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))


@pytest.mark.parametrize(
    ("spoil", "count", "scenes", "least"),
    [
        (clean, 1, 200, 0.995),
        (clean, 2, 150, 0.99),
        (clean, 3, 50, 0.98),
        (poor, 1, 100, 0.98),
        (poor, 2, 100, 0.98),
        (poor, 3, 50, 0.98),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_it_says_yes_to_right_pictures(
    spoil: Callable[[Image.Image, int], Image.Image], count: int, scenes: int, least: float
) -> None:
    """Held-out scenes; everything the caption claims at once."""
    right = []
    for seed in range(scenes):
        scene = sample(seed, "test", count=count)
        right.append(judge(spoil(draw(scene), seed), claims(scene)).right)
    assert np.mean(right) >= least


@pytest.mark.parametrize("spoil", [clean, poor], ids=lambda value: value.__name__)
@pytest.mark.parametrize(("kind", "count"), [("shape", 1), ("shape", 2), ("colour", 1), ("colour", 2), ("relation", 2)])
def test_it_says_no_to_wrong_pictures(spoil: Callable[[Image.Image, int], Image.Image], kind: str, count: int) -> None:
    wrong = []
    for seed in range(40):
        scene = replace(sample(seed, "test", count=count), arrangement_told=True)
        # How many there are and where is still right: what must be seen is the shape, the colour or the relation.
        checked = [claim for claim in claims(scene) if isinstance(claim, Present | Related)]
        wrong.append(not judge(spoil(draw(other(scene, kind, seed)), seed), checked).right)
    assert np.mean(wrong) >= (0.99 if spoil is clean else 0.98)


def canvas(size: tuple[int, int] = (128, 128), ground: str = "white") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", size, ground)
    return image, ImageDraw.Draw(image)


def only(image: Image.Image) -> Seen:
    (thing,) = look(image)
    return thing


@pytest.mark.parametrize("degrees", [0, 20, 45, 90, 200])
@pytest.mark.parametrize("radius", [18, 30, 44])
@pytest.mark.parametrize(("sides", "name"), [(3, "triangle"), (4, "square"), (6, "hexagon")])
def test_regular_polygons_drawn_by_pillow(sides: int, name: str, radius: int, degrees: int) -> None:
    image, pen = canvas()
    pen.regular_polygon((64, 64, radius), sides, rotation=degrees, fill="green")
    assert only(image).name == (name, "green")


@pytest.mark.parametrize("ground", ["white", "#cfe3f5", "#20264f", "#fa8072"])
def test_a_disc_a_ring_and_an_ellipse_drawn_by_pillow(ground: str) -> None:
    image, pen = canvas((256, 128), ground)
    pen.ellipse((20, 40, 70, 90), fill="gold")
    pen.ellipse((90, 40, 140, 90), outline="gold", width=10)
    pen.ellipse((160, 50, 220, 86), fill="gold")
    seen = sorted(look(image), key=lambda thing: thing.x)
    assert [thing.name for thing in seen] == [("circle", "yellow"), ("ring", "yellow"), ("oval", "yellow")]
    assert all(abs(thing.x * 256 - x) < 1.5 for thing, x in zip(seen, (45, 115, 190), strict=True))
    assert all(abs(thing.y * 128 - y) < 1.5 for thing, y in zip(seen, (65, 65, 68), strict=True))
    assert all(abs(thing.radius * 128 - r) < 1.5 for thing, r in zip(seen, (25, 25, 30), strict=True))


@pytest.mark.parametrize(
    ("css", "name"),
    [
        ("crimson", "red"),
        ("darkorange", "orange"),
        ("gold", "yellow"),
        ("forestgreen", "green"),
        ("darkturquoise", "cyan"),
        ("royalblue", "blue"),
        ("darkorchid", "purple"),
        ("hotpink", "pink"),
        ("saddlebrown", "brown"),
        ("#111111", "black"),
    ],
)
def test_colours_of_the_web(css: str, name: str) -> None:
    image, pen = canvas()
    pen.rectangle((40, 40, 90, 90), fill=css)
    assert only(image).name == ("square", name)


def test_lab_of_known_colours() -> None:
    """CIELAB under D65 of the corners of sRGB, as colour tables have them."""
    known = {
        (255, 255, 255): (100, 0, 0),
        (0, 0, 0): (0, 0, 0),
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (0, 0, 255): (32.30, 79.19, -107.86),
        (128, 128, 128): (53.59, 0, 0),
    }
    lab = judging.to_lab(np.array(list(known), np.float64))
    np.testing.assert_allclose(lab, list(known.values()), atol=0.02)


def test_things_that_touch_are_two_if_their_colours_differ() -> None:
    image, pen = canvas()
    pen.rectangle((14, 40, 63, 89), fill="crimson")
    pen.rectangle((64, 40, 113, 89), fill="royalblue")
    assert {thing.name for thing in look(image)} == {("square", "red"), ("square", "blue")}


def test_what_has_no_name_gets_none() -> None:
    rng = np.random.default_rng(0)
    named = 0
    for _ in range(60):
        image, pen = canvas()
        angles = np.arange(9) * 2 * np.pi / 9
        radii = rng.permutation([12, 14, 16, 18, 30, 34, 38, 44, 48])
        pen.polygon([(64 + r * np.cos(a), 64 + r * np.sin(a)) for r, a in zip(radii, angles, strict=True)], fill="red")
        named += any(thing.shape for thing in look(image))
    assert named < 20
    image, pen = canvas()
    pen.rectangle((40, 40, 90, 90), fill="#808080")
    assert only(image).name == ("square", None)


@pytest.mark.parametrize("size", [(128, 128), (64, 96), (1, 1)])
def test_nothing_is_seen_where_nothing_is(size: tuple[int, int]) -> None:
    width, height = size
    assert look(Image.new("RGB", size, "white")) == ()
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert judge(Image.fromarray(noise), [Present(("circle", "red"))]).holds == (False,)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_other_modes(mode: str) -> None:
    image, pen = canvas()
    pen.ellipse((40, 40, 90, 90), fill="black")
    assert only(image.convert(mode)).name == ("circle", "black")


def test_claims() -> None:
    image, pen = canvas((192, 128))
    pen.ellipse((10, 34, 70, 94), fill="crimson")
    pen.rectangle((120, 52, 150, 82), fill="royalblue")
    disc, square, neither = ("circle", "red"), ("square", "blue"), ("circle", "blue")
    true = [
        Counted(2),
        Present(disc),
        Present(square),
        Sized(disc, "large"),
        Sized(square, "small"),
        Placed(disc, "left"),
        Placed(square, "right"),
        Related(disc, "left of", square),
        Related(square, "right of", disc),
    ]
    false = [
        Counted(1),
        Counted(3),
        Present(neither),
        Sized(disc, "small"),
        Sized(square, "large"),
        Sized(neither, "small"),
        *(Placed(disc, place) for place in PLACES if "left" not in place),
        Related(square, "left of", disc),
        Related(disc, "above", square),
        Related(disc, "below", square),
        Related(neither, "left of", square),
    ]
    verdict = judge(image, [*true, *false])
    assert verdict.holds == (True,) * len(true) + (False,) * len(false)
    assert [thing.name for thing in verdict.seen] == [disc, square]
    assert judge(image, true).right
    assert not verdict.right
    assert judge(image, []).right
