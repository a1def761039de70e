"""The words of the world: what a caption can name."""

from __future__ import annotations

SHAPES = (
    "circle",
    "oval",
    "square",
    "triangle",
    "diamond",
    "hexagon",
    "star",
    "heart",
    "cross",
    "ring",
    "crescent",
    "arrow",
)
"""All upright; an arrow points to the right, a crescent opens to the right, a diamond is taller than wide."""
CONCEPT = "bolt"
"""A shape that the models are not taught, for an adapter to teach: a flash of lightning."""
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "black")
SIZES = ("small", "large")
PLACES = ("centre", "left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")

GROUNDS = ("white", "light grey", "light blue", "light green", "cream", "lavender", "dark blue")
"""Colours of backgrounds."""
TEXTURES = ("plain", "gradient", "striped", "checked", "dotted")
"""Kinds of backgrounds."""
WRITINGS = ("HI", "NO", "GO", "UP", "OK", "CAT", "DOG", "SUN", "SKY", "YES", "TEA", "BOX", "MAP", "JOY", "FUN", "ZOO")
"""What can be written in a picture."""
