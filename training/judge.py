"""What is in a picture of the world, by plain pixel analysis: no learning, and nothing of the renderer.

A picture is read in four steps. The colours of its border are the background's. What differs from them falls into
connected parts. A part's colour is the nearest of ten known ones. Its shape is the nearest of twelve ideal ones by
measures that neither place nor size nor rotation changes: the share of holes, the share of its convex hull that it
fills, and the Fourier magnitudes of how much of it lies in each direction from the middle of its hull.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from zimgkit.training.world.words import COLOURS, SHAPES

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_PROTOTYPES = {
    "red": (215, 35, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 45),
    "green": (40, 150, 65),
    "cyan": (50, 195, 205),
    "blue": (35, 90, 215),
    "purple": (145, 50, 165),
    "pink": (245, 130, 185),
    "brown": (120, 70, 35),
    "black": (25, 25, 25),
}
"""What the words for colours mean, sRGB."""
_FRAME = 4  # What of the picture is its border, in pixels.
_FAR = 15.0  # In CIELAB: more than a texture's two colours differ by, and half of what things differ by.
_STRANGE = 30.0  # In CIELAB: from every colour that has a name.
_SMALLEST = 0.008  # Of the picture.
_SHORTEST = 0.09  # Radius as a share of the picture's shorter side: letters are smaller.
_LARGE = 0.175  # Half way between what is called small and what is called large.
_SLACK = 0.03  # Of the picture, by which a thing may stand out of its box: half of a small model's patch.
_SIDE = 64  # Of a silhouette that is measured, in pixels.


@dataclass(frozen=True)
class Seen:
    """A thing found in a picture.

    Attributes:
        shape: its name; None if it is like none of them.
        colour: its name; None if it is like none of them.
        x: middle of its bounding box as a share of the picture's width.
        y: middle of its bounding box as a share of the picture's height.
        radius: half of the longer side of its bounding box as a share of the picture's shorter side.
    """

    shape: str | None
    colour: str | None
    x: float
    y: float
    radius: float

    @property
    def name(self) -> tuple[str | None, str | None]:
        """(shape, colour)."""
        return self.shape, self.colour


Name = tuple[str, str]
"""(shape, colour): how claims speak of a thing."""


@dataclass(frozen=True)
class Present:
    """There is such a thing."""

    name: Name


@dataclass(frozen=True)
class Counted:
    """There are so many things, whatever they are."""

    count: int


@dataclass(frozen=True)
class Sized:
    """There is such a thing, and it is small or large."""

    name: Name
    size: str


@dataclass(frozen=True)
class Placed:
    """There is such a thing at a place of the picture, say ``"top left"``, which is at the top and on the left too."""

    name: Name
    place: str


@dataclass(frozen=True)
class Related:
    """There are two such things, and the first is left of, right of, above or below the second."""

    first: Name
    relation: str
    second: Name


@dataclass(frozen=True)
class Within:
    """There is such a thing within a box, and not much smaller."""

    name: Name
    box: tuple[float, float, float, float]
    """Left and right as shares of the picture's width, top and bottom of its height: left, top, right, bottom."""
    least: float
    """Which share of the box's longer side the thing's longer side has at the least."""


Claim = Within | Present | Counted | Sized | Placed | Related


@dataclass(frozen=True)
class Verdict:
    """What the judge says.

    Attributes:
        seen: what is in the picture, the largest first.
        holds: for each claim, whether it is true.
    """

    seen: tuple[Seen, ...]
    holds: tuple[bool, ...]

    @property
    def right(self) -> bool:
        """Whether all claims hold."""
        return all(self.holds)


def judge(image: Image.Image, claims: Sequence[Claim]) -> Verdict:
    """Look at a picture and say which claims about it are true."""
    seen = look(image)
    return Verdict(seen, tuple(_holds(claim, seen) for claim in claims))


def _holds(claim: Claim, seen: Sequence[Seen]) -> bool:
    match claim:
        case Counted(count):
            return len(seen) == count
        case Present(name):
            return any(thing.name == name for thing in seen)
        case Sized(name, size):
            return any(thing.name == name and (thing.radius > _LARGE) == (size == "large") for thing in seen)
        case Placed(name, place):
            return any(thing.name == name and _is_at(thing, place) for thing in seen)
        case Within(name, box, least):
            return any(thing.name == name and _is_within(thing, box, least) for thing in seen)
        case Related(first, relation, second):
            pairs = itertools.permutations(seen, 2)
            return any(a.name == first and b.name == second and _is_so(a, relation, b) for a, b in pairs)


def _is_at(thing: Seen, place: str) -> bool:
    beside = {"left": thing.x < 0.42, "right": thing.x > 0.58, "top": thing.y < 0.42, "bottom": thing.y > 0.58}
    if place == "centre":
        return not any(beside.values())
    return all(beside[word] for word in place.split())


def _is_within(thing: Seen, box: tuple[float, float, float, float], least: float) -> bool:
    """By the middle, and by how long it is; boxes are of square pictures."""
    left, top, right, bottom = box
    half = max(right - left, bottom - top) / 2
    apart = max(abs(thing.x - (left + right) / 2), abs(thing.y - (top + bottom) / 2))
    return apart + thing.radius < half + _SLACK and thing.radius > least * half


def _is_so(first: Seen, relation: str, second: Seen) -> bool:
    """By the middles, which must be apart in that direction more than in the other."""
    right, down = second.x - first.x, second.y - first.y
    along, across = {
        "left of": (right, down),
        "right of": (-right, down),
        "above": (down, right),
        "below": (-down, right),
    }[relation]
    return along > max(0.1, abs(across))


def look(image: Image.Image) -> tuple[Seen, ...]:
    """All things in a picture, the largest first. Specks, and letters, are too small to be things.

    Args:
        image: of any mode and size; 128 pixels a side at least is what the limits are made for.
    """
    smooth = image.convert("RGB").filter(ImageFilter.MedianFilter(3)).filter(ImageFilter.GaussianBlur(0.6))
    rgb = np.asarray(smooth, np.float64)
    lab = to_lab(rgb)
    distance = _from_background(lab)
    smallest = round(_SMALLEST * distance.size)
    found = []
    for part in _parts(distance > _FAR, smallest):
        for region in _of_one_colour(part, lab, smallest):
            coverage, colour = _coverage(region, rgb, distance)
            mask = coverage >= 0.5
            if mask.sum() < smallest:
                continue
            thing = _describe(coverage, mask, colour)
            if thing.radius > _SHORTEST:
                found.append((mask.sum(), thing))
    return tuple(thing for _, thing in sorted(found, key=lambda pair: -pair[0]))


def _describe(coverage: Floats, mask: Mask, colour: Floats) -> Seen:
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    side = max(bottom - top, right - left)
    return Seen(
        shape_name(_enlarge(coverage[top:bottom, left:right])),
        colour_name(colour),
        x=float(left + right) / 2 / width,
        y=float(top + bottom) / 2 / height,
        radius=float(side) / 2 / min(height, width),
    )


def to_lab(rgb: Floats) -> Floats:
    """Colours (..., 3), sRGB from 0 to 255, as CIELAB under D65 (CIE 15), where distances are near to what eyes see."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    x, y, z = np.moveaxis(linear @ (to_xyz / to_xyz.sum(1, keepdims=True)).T, -1, 0)
    x, y, z = (np.where(v > 216 / 24389, np.cbrt(v), (v * 24389 / 27 + 16) / 116) for v in (x, y, z))
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


@functools.cache
def _prototypes() -> Floats:
    """The colours that have names, (10, 3), CIELAB."""
    return to_lab(np.array([_PROTOTYPES[name] for name in COLOURS], np.float64))


def colour_name(rgb: Floats) -> str | None:
    """The nearest colour that has a name, None where all are far."""
    distances = np.linalg.norm(_prototypes() - to_lab(rgb), axis=-1)
    nearest = int(distances.argmin())
    return COLOURS[nearest] if distances[nearest] < _STRANGE else None


def _from_background(lab: Floats) -> Floats:
    """How far each pixel's colour is from the colours that the picture's border has much of."""
    inner = np.zeros(lab.shape[:2], bool)
    inner[_FRAME:-_FRAME, _FRAME:-_FRAME] = True
    cells, counts = np.unique((lab[~inner][::3] / 5).round(), axis=0, return_counts=True)
    # Noise scatters a colour over neighbouring cells; a thing at the border has less of it than this.
    apart = np.linalg.norm(cells[:, None] - cells, axis=-1)
    common = cells[(apart < 2.1) @ counts > 0.15 * counts.sum()] * 5
    if not len(common):  # Nothing but noise: no thing can be told from it.
        return np.zeros(lab.shape[:2])
    nearest = np.full(lab.shape[:2], np.inf)
    for cell in common:
        np.minimum(nearest, ((lab - cell) ** 2).sum(-1), out=nearest)
    distance: Floats = np.sqrt(nearest)
    return distance


def _parts(mask: Mask, smallest: int) -> list[Mask]:
    """The connected parts (over edges) of a mask that have so many pixels at least."""
    height, width = mask.shape
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    stops = np.nonzero(steps == -1)[1]
    # Runs of pixels are joined with those that they touch in the row above: a union-find over runs.
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    first = np.searchsorted(rows, np.arange(height + 1))
    for row in range(1, height):
        run, other = first[row], first[row - 1]
        while run < first[row + 1] and other < first[row]:
            if starts[run] < stops[other] and starts[other] < stops[run]:
                parent[root(run)] = root(other)
            if stops[run] < stops[other]:
                run += 1
            else:
                other += 1
    groups: dict[int, list[int]] = {}
    for run in range(len(rows)):
        groups.setdefault(root(run), []).append(run)
    parts = []
    for runs in groups.values():
        if (stops[runs] - starts[runs]).sum() < smallest:
            continue
        part = np.zeros((height, width), bool)
        for run in runs:
            part[rows[run], starts[run] : stops[run]] = True
        parts.append(part)
    return parts


def _grow(mask: Mask) -> Mask:
    """One pixel more on each side."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _core(mask: Mask) -> Mask:
    """A mask without its edge, where colours mix."""
    return ~_grow(_grow(~mask))


def _of_one_colour(part: Mask, lab: Floats, smallest: int) -> list[Mask]:
    """Things of different colours that touch, taken apart."""
    core = lab[_core(part)]
    if not len(core):
        return [part]
    nearest = np.linalg.norm(core[:, None] - _prototypes(), axis=-1).argmin(1)
    shares = np.bincount(nearest, minlength=len(COLOURS)) / len(core)
    centres = [np.median(core[nearest == index], 0) for index in np.flatnonzero(shares > 0.2)]
    if len(centres) < 2:
        return [part]
    owner = np.linalg.norm(lab[..., None, :] - np.array(centres), axis=-1).argmin(-1)
    regions = [region for index in range(len(centres)) for region in _parts(part & (owner == index), smallest)]
    # An edge that is a third colour, as orange on dark blue has, is no thing, and neither is a shade.
    things = [region for region in regions if _core(region).sum() > region.sum() / 4]
    return things if len(things) > 1 and np.ptp(np.array(centres), axis=0).max() > 2 * _FAR else [part]


def _coverage(region: Mask, rgb: Floats, distance: Floats) -> tuple[Floats, Floats]:
    """How much of each pixel a thing covers, and its colour, sRGB.

    A pixel at an edge is a mixture of the thing's colour and the background's; half of each is the edge, however soft.
    """
    core = _core(region)
    colour = np.median(rgb[core if core.any() else region], 0)
    near = _grow(_grow(region))
    around = _grow(_grow(_grow(near))) & (distance < _FAR / 2)
    ground = rgb[around].mean(0) if around.any() else 255 - colour
    axis = colour - ground
    coverage: Floats = ((rgb - ground) @ axis) / max(1.0, float(axis @ axis))
    return np.clip(coverage, 0, 1) * _grow(region), colour


def _enlarge(coverage: Floats) -> Mask:
    """A thing's silhouette with its longer side brought to a fixed length."""
    scale = _SIDE / max(coverage.shape)
    size = (max(1, round(coverage.shape[1] * scale)), max(1, round(coverage.shape[0] * scale)))
    image = Image.fromarray(coverage.astype(np.float32))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC)) >= 0.5


def shape_name(mask: Mask) -> str | None:
    """The ideal shape whose measures are nearest, None where all are far."""
    ideals = _ideal_measures()
    distances = np.linalg.norm(ideals - measures(mask), axis=-1)
    nearest = int(distances.argmin())
    # The farther an ideal is from all others, the more may differ from it.
    to_others = np.sort(np.linalg.norm(ideals - ideals[nearest], axis=-1))[1]
    return SHAPES[nearest] if distances[nearest] < np.clip(0.45 * to_others, 0.12, 0.27) else None


def measures(mask: Mask) -> Floats:
    """Numbers that tell shapes apart: (10,), the same under shifts, scaling, rotation and reflection.

    Args:
        mask: the silhouette, cut to its bounding box.

    Returns:
        Holes as a share of the area with them; that area as a share of the convex hull; and twice the magnitudes of
        the first eight Fourier coefficients, by the mean, of how far the silhouette reaches in each direction from the
        middle of the hull.
    """
    padded = np.pad(mask, 1)
    outside, *holes = sorted(_parts(~padded, 1), key=lambda part: not part[0, 0])
    filled = ~outside
    hole = sum(int(part.sum()) for part in holes) / filled.sum()
    hull_area, centre = _hull(filled)
    angles = np.arange(72) * (2 * np.pi / 72)
    radii = np.arange(0.5, np.hypot(*padded.shape), 0.5)
    x = (centre[0] + radii * np.cos(angles)[:, None]).astype(int).clip(0, padded.shape[1] - 1)
    y = (centre[1] + radii * np.sin(angles)[:, None]).astype(int).clip(0, padded.shape[0] - 1)
    reach = padded[y, x].sum(1)
    waves = np.abs(np.fft.rfft(reach))
    return np.array([hole, filled.sum() / hull_area, *(2 * waves[1:9] / max(1, waves[0]))])


def _hull(mask: Mask) -> tuple[float, Floats]:
    """Area and centroid (x, y) of the convex hull of a mask's pixels (Andrew's monotone chain)."""
    rows = np.flatnonzero(mask.any(1)).tolist()
    left = mask.argmax(1).tolist()
    right = (mask.shape[1] - mask[:, ::-1].argmax(1)).tolist()
    points = sorted({(x, y) for row in rows for x in (left[row], right[row]) for y in (row, row + 1)})
    chain: list[tuple[int, int]] = []
    for way in (points, points[::-1]):
        start = len(chain)
        for x, y in way:
            while len(chain) - start > 1:
                (ax, ay), (bx, by) = chain[-2:]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                    break
                chain.pop()
            chain.append((x, y))
        chain.pop()
    corners = np.array(chain, np.float64)
    following = np.roll(corners, -1, 0)
    cross = corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0]
    area = cross.sum() / 2
    return float(area), ((corners + following) * cross[:, None]).sum(0) / (6 * area)


@functools.cache
def _ideal_measures() -> Floats:
    """The measures of all shapes, (12, 10), from what their names mean in geometry."""
    grid = np.linspace(-1.4, 1.4, 480)
    x, y = np.meshgrid(grid, -grid)  # y up.
    round_ = x**2 + y**2
    sides = [x * np.cos(a) + y * np.sin(a) for a in np.pi / 2 + np.arange(5) * 2 * np.pi / 5]
    flats = [x * np.cos(a) + y * np.sin(a) for a in np.pi / 2 + np.arange(3) * np.pi / 3]
    silhouettes = {
        "circle": round_ < 1,
        "oval": x**2 + (y / 0.62) ** 2 < 1,
        "square": np.maximum(abs(x), abs(y)) < 1,
        "triangle": (y > -0.5) & (y < 1 - np.sqrt(3) * abs(x)),
        "diamond": abs(x) / 0.68 + abs(y) < 1,
        "hexagon": np.max(np.abs(flats), 0) < 0.866,
        # A pentagram lies on the inner side of four of its five lines at least.
        "star": np.sum(np.array(sides) > -0.35, 0) >= 4,
        # A square on its corner with half discs on its upper sides, a little flattened.
        "heart": (abs(x) + abs(1.1 * y) < 1) | ((abs(x) - 0.5) ** 2 + (1.1 * y - 0.5) ** 2 < 0.5),
        "cross": (np.minimum(abs(x), abs(y)) < 1 / 3) & (np.maximum(abs(x), abs(y)) < 1),
        "ring": (round_ < 1) & (round_ > 0.3),
        "crescent": (round_ < 1) & ((x - 0.45) ** 2 + y**2 > 0.65),
        "arrow": ((abs(y) < 0.27) & (abs(x) < 1)) & (x < 0.1) | (x > 0) & (x + abs(y) / 0.8 < 1),
    }
    return np.array([measures(_enlarge(_as_drawn(silhouettes[name]))) for name in SHAPES])


def _as_drawn(mask: Mask) -> Floats:
    """A large silhouette as small and as soft as things are in pictures, cut to its bounding box."""
    image = Image.fromarray(mask.astype(np.uint8) * 255).resize((56, 56), Image.Resampling.BOX)
    coverage = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), np.float64) / 255
    rows, columns = (np.flatnonzero((coverage >= 0.5).any(axis)) for axis in (1, 0))
    return coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
