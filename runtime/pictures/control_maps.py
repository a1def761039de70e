"""Control pictures of pictures: edges by OpenCV, and depth, poses or lines by an ONNX file of the user's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import UsageError, ZimgError, install
from zimgkit.runtime.pictures.reading import flattened

if TYPE_CHECKING:
    from PIL.Image import Image

CANNY = "canny"
LAYOUTS = ("nchw", "nhwc")
SCALINGS = ("imagenet", "unit", "signed", "bytes")
"""How pixels go in: ImageNet's mean and deviation, 0 to 1, -1 to 1, or 0 to 255."""
LEVELS = ("range", "unit", "signed", "bytes")
"""How what comes out becomes 8 bits: its own least and greatest values, or as pixels go in."""
MULTIPLE = 32
"""Sides that a file leaves open are brought to multiples of it, unless they are named."""
MOST_SIDE = 8192
"""In pixels."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
}
"""What ONNX Runtime calls the element types that pixels can go in as."""


class Kind(NamedTuple):
    """What files of a kind mostly take in and give."""

    scaling: str
    levels: str


KINDS: Mapping[str, Kind] = {
    "depth": Kind("imagenet", "range"),
    "pose": Kind("unit", "unit"),
    "lineart": Kind("unit", "unit"),
    "softedge": Kind("bytes", "unit"),
    "normal": Kind("imagenet", "signed"),
}
"""What ONNX files of the user's own make."""
NAMES = (CANNY, *KINDS)


@dataclass(frozen=True)
class Way:
    """How a file is used; None where it, or its kind, tells."""

    layout: str | None = None
    size: tuple[int, int] | None = None
    """Width and height of what goes in."""
    scaling: str | None = None
    levels: str | None = None
    invert: bool = False
    """Whether black and white change places at the end."""


def canny(picture: Image, low: float = 100, high: float = 200) -> Image:
    """The edges of a picture, white on black, as ``cv2.Canny`` finds them in RGB.

    Args:
        picture: RGB or RGBA.
        low: what a pixel beside an edge must reach.
        high: what makes an edge.

    Returns:
        RGB, of the picture's size.

    Raises:
        UsageError: a threshold is no finite number from 0, or they are in falling order.
        ZimgError: OpenCV is not installed.
    """
    if not (math.isfinite(low) and math.isfinite(high) and 0 <= low <= high):
        raise UsageError(f"the thresholds are {low:g} and {high:g}", "give numbers from 0, the lower one first")
    if not find_spec("cv2"):
        raise ZimgError("canny needs opencv-python-headless", install("control"))
    import cv2
    from PIL import Image

    edges = cv2.Canny(np.ascontiguousarray(flattened(picture)), low, high)
    return Image.fromarray(np.repeat(edges[:, :, None], 3, axis=2))


def mapped(picture: Image, kind: str, file: Path, way: Way | None = None) -> Image:
    """What an ONNX file makes of a picture.

    Args:
        picture: RGB or RGBA.
        kind: one of :data:`KINDS`, which tells how pixels go in and come out where ``way`` does not.
        file: takes one picture, of any layout, and gives a map or a picture first: (1, 1 or 3, H, W), (1, H, W, 1 or
            3), (1, H, W) or (H, W).
        way: how it is used.

    Returns:
        RGB, of the picture's size.

    Raises:
        UsageError: the file is missing, none that ONNX Runtime runs, takes something else than a picture, or gives
            something else than a map; or the size is none.
    """
    way, usual = way or Way(), KINDS[kind]
    session = _opened(file)
    inputs = session.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(entry.name for entry in inputs) or "nothing"
        raise UsageError(f"{file} takes {names}", "name a file that takes one picture")
    (entry,) = inputs
    layout, (width, height) = _taken_in(file, entry.shape, picture.size, way)
    if entry.type not in TYPES:
        raise UsageError(f"{file} takes {entry.type}", f"name one that takes {', '.join(TYPES)}")
    pixels = np.asarray(_resized(flattened(picture), width, height), np.float32)
    pixels = _scaled(pixels, way.scaling or ("bytes" if TYPES[entry.type] == "uint8" else usual.scaling))
    pixels = pixels.transpose(2, 0, 1) if layout == "nchw" else pixels
    feeds = {entry.name: np.ascontiguousarray(pixels[None], TYPES[entry.type])}
    try:
        given = session.run([session.get_outputs()[0].name], feeds)[0]
    except Exception as error:  # ONNX Runtime's own
        raise UsageError(f"{file} cannot be run at {width}x{height} ({_first_line(error)})", "try --size") from None
    levels = _levels(_as_map(file, given), way.levels or usual.levels)
    return _picture(255 - levels if way.invert else levels, picture.size)


def _opened(file: Path) -> Any:
    import onnxruntime as ort

    import zimgkit.engines.onnxruntime  # noqa: F401, before it, for what it may send

    if not file.is_file():
        raise UsageError(f"there is no file {file}", "name an ONNX file")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # What fails is raised; its log would be a second message.
    try:
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's own
        message = f"{file} is none that ONNX Runtime runs ({_first_line(error)})"
        raise UsageError(message, "name an ONNX file, with its weights beside it where they are apart") from None


def _taken_in(file: Path, shape: list[int | str | None], own: tuple[int, int], way: Way) -> tuple[str, tuple[int, int]]:
    """The layout, and width and height, of what a file takes in."""
    fitting = [name for name in LAYOUTS if len(shape) == 4 and not _is_other(shape[1 if name == "nchw" else 3], 3)]
    if not fitting or _is_other(shape[0], 1):
        raise UsageError(f"{file} takes {shape}, which is no picture", "name a file that takes one picture in RGB")
    if way.layout and way.layout not in fitting:
        raise UsageError(f"{file} takes {shape}, which is not {way.layout}", "leave --layout out")
    # A fixed 3 tells; where all is open, channels mostly come first.
    sure = [name for name in fitting if shape[1 if name == "nchw" else 3] == 3]
    layout = way.layout or (sure or fitting)[0]
    fixed = shape[2:] if layout == "nchw" else shape[1:3]
    wanted = way.size or tuple(max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in own)
    height, width = (
        end if isinstance(end, int) and end > 0 else side for end, side in zip(fixed, reversed(wanted), strict=True)
    )
    if way.size and (width, height) != way.size:
        raise UsageError(f"{file} takes {width}x{height} alone, not {way.size[0]}x{way.size[1]}", "leave --size out")
    if not all(0 < side <= MOST_SIDE for side in (width, height)):
        raise UsageError(f"{width}x{height} cannot be taken in", f"give sides from 1 to {MOST_SIDE} pixels with --size")
    return layout, (width, height)


def _is_other(side: int | str | None, than: int) -> bool:
    """Whether a dimension is fixed, at something else."""
    return isinstance(side, int) and side > 0 and side != than


def _scaled(pixels: NDArray[np.float32], scaling: str) -> NDArray[np.float32]:
    """(H, W, 3) from 0 to 255 as a file takes it."""
    if scaling == "imagenet":
        mean, deviation = np.asarray(MEAN, np.float32), np.asarray(DEVIATION, np.float32)
        normalized: NDArray[np.float32] = (pixels / np.float32(255) - mean) / deviation
        return normalized
    return {"unit": pixels / 255, "signed": pixels / 127.5 - 1, "bytes": pixels}[scaling]


def _as_map(file: Path, given: Any) -> NDArray[np.float32]:
    """What a file gave as (H, W, 1 or 3)."""
    shape = np.shape(given)
    found = np.asarray(given)
    while found.ndim > 2 and found.shape[0] == 1:
        found = found[0]
    if found.ndim == 2:
        found = found[:, :, None]
    elif found.ndim == 3 and found.shape[0] in (1, 3) and found.shape[2] not in (1, 3):
        found = found.transpose(1, 2, 0)
    # A row of numbers is no map, such as the classes of a picture.
    if found.ndim != 3 or found.shape[2] not in (1, 3) or min(found.shape[:2]) < 2 or found.dtype.kind not in "fiub":
        raise UsageError(f"{file} gives {list(shape)} of {found.dtype}, which is no map", "name one that gives a map")
    values = found.astype(np.float32)
    if not np.isfinite(values).all():
        raise UsageError(f"{file} gives NaN or Inf", "try another --scaling, or another file")
    return values


def _levels(values: NDArray[np.float32], levels: str) -> NDArray[np.float32]:
    """From 0 to 255."""
    if levels == "range":
        low, high = values.min(), values.max()
        return (values - low) * np.float32(255 / (high - low)) if high > low else np.zeros_like(values)
    whole = {"unit": values * 255, "signed": (values + 1) * 127.5, "bytes": values}[levels]
    cut: NDArray[np.float32] = np.clip(whole, 0, 255)
    return cut


def _picture(levels: NDArray[np.float32], size: tuple[int, int]) -> Image:
    from PIL import Image

    rounded = np.repeat(np.rint(levels).astype(np.uint8), 3 // levels.shape[2], axis=2)
    return _resized(Image.fromarray(rounded), *size)


def _resized(picture: Image, width: int, height: int) -> Image:
    from PIL import Image

    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.BICUBIC)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]
