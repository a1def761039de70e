"""Pictures as people have them: files of any mode, arrays and tensors, to 8-bit RGB or RGBA.

Nothing in a file is trusted: formats are few, pixels are bounded before they are decoded, and whatever Pillow raises
or warns of becomes one line.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI", "HEIF")
"""What is decoded where Pillow can: neither formats that start other programs (EPS) nor those without a signature."""
NAMED = "PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF"
MOST_PIXELS = 1 << 26
"""A picture takes 4 bytes a pixel, and no model takes in more than a few million of them."""
MOST_BYTES = 1 << 29
"""Of a file."""
SLACK = 1e-3
"""How far a number may lie outside 0...1, as resized arrays have it."""
OTHERS = (
    (re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*|<!DOCTYPE[^>]*>\s*)*<svg\b", re.DOTALL), "an SVG drawing"),
    (re.compile(rb".{4}ftyp(heic|heix|hevc|heim|heis|mif1|msf1)", re.DOTALL), "a HEIC photo"),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "an AVIF picture that is broken, or too new for this Pillow"),
    (re.compile(rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ", re.DOTALL), "a video"),
    (re.compile(rb"%PDF"), "a PDF"),
    (re.compile(rb"8BPS"), "a Photoshop file"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "a PostScript file"),
)
"""Signatures of what people take for pictures, and what it is."""
_PILLOW = threading.Lock()
"""Filters of warnings are the process's own: two threads that changed them at once would leave them changed."""
_UNHEARD = logging.NullHandler()


def read_picture(source: Any, name: str = "image") -> Image:
    """Read a picture as it is meant to be seen.

    The rotation in EXIF is applied, the first frame of an animated file is taken, 16 bits are scaled to 8, and
    palettes, CMYK and grey become RGB; a picture with transparency becomes RGBA.

    Args:
        source: a path, a file's bytes, a binary file object, a PIL image, a numpy array or a torch tensor. Arrays are
            (H, W) or (H, W, 1, 3 or 4), tensors may have their channels first; one leading axis of 1 is dropped.
            They are uint8, uint16, bool, or floats from 0 to 1.
        name: what messages call it.

    Raises:
        UsageError: there is no such picture, it is broken, too large or of a format or shape that is not read.
    """
    from PIL.Image import Image

    if isinstance(source, Image):
        with _pillow(name):
            return _to_rgb(_upright(source, name), name)
    if isinstance(source, str | os.PathLike):
        return _from_path(source, name)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(bytes(source), name)
    if hasattr(source, "read"):
        return _from_file(source, name)
    if hasattr(source, "detach") or hasattr(source, "__array__"):
        return _to_rgb(_from_array(source, name), name)
    hint = "give a path, a file's bytes, a PIL image, an array or a tensor"
    raise UsageError(f"{name} is of type {type(source).__name__}", hint)


def flattened(picture: Image, level: int = 255) -> Image:
    """A picture without transparency, over white, as transformers' image processors lay it.

    Below transparent pixels files have any colour, mostly black, that nobody has seen: dropping alpha would show it.

    Args:
        picture: RGB or RGBA.
        level: 0 lays it over black.

    Returns:
        RGB.
    """
    from PIL import Image

    if picture.mode != "RGBA":
        return picture.convert("RGB")
    ground = Image.new("RGBA", picture.size, (level, level, level, 255))
    return Image.alpha_composite(ground, picture).convert("RGB")


def digest(picture: Image) -> str:
    """A picture's SHA-256, over its mode, size and pixels: the same for every file that shows the same."""
    width, height = picture.size
    found = hashlib.sha256(f"{picture.mode} {width}x{height}\n".encode())
    found.update(picture.tobytes())
    return found.hexdigest()


def _from_path(source: str | os.PathLike[str], name: str) -> Image:
    path, hint = os.fsdecode(source), "name a picture file"
    if not path:
        raise UsageError(f"{name} has an empty path", hint)
    where = f"{name} {''.join(c if c.isprintable() else '?' for c in path[:300])}"
    if re.match(r"(?i)(https?|ftp|s3|data):", path):
        raise UsageError(f"{where[:100]} is an address", "download it first, and name the file")
    try:
        with Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"{where} does not exist", hint) from None
    except IsADirectoryError:
        raise UsageError(f"{where} is a folder", hint) from None
    except (OSError, ValueError) as error:  # ValueError: a zero character in the path.
        raise UsageError(f"{where} cannot be read ({getattr(error, 'strerror', None) or error})", hint) from None
    return _decode(data, where)


def _from_file(file: Any, name: str) -> Image:
    try:
        data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} cannot be read ({error})", "give a file that is open for reading") from None
    if not isinstance(data, bytes):
        raise UsageError(f"{name} is a file of text", 'open it with mode "rb"')
    return _decode(data, name)


def _decode(data: bytes, where: str) -> Image:
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise UsageError(f"{where} is empty", "give another picture")
    if len(data) > MOST_BYTES:
        raise UsageError(f"{where} has more than {MOST_BYTES >> 20} MB", "make it smaller first")
    with _pillow(where):
        # The plugins of rarer formats take longer to load than a picture.
        for load_plugins in (Image.preinit, Image.init):
            load_plugins()
            with contextlib.suppress(UnidentifiedImageError):
                picture = Image.open(BytesIO(data), formats=[kind for kind in FORMATS if kind in Image.OPEN])
                return _to_rgb(_upright(picture, where), where)
    kind = next((kind for signature, kind in OTHERS if signature.match(data[:4096])), None)
    if kind:
        raise UsageError(f"{where} is {kind}", "convert it to PNG or JPEG first")
    raise UsageError(f"{where} is no picture that can be read, or broken", f"give one of {NAMED}")


@contextlib.contextmanager
def _pillow(where: str) -> Iterator[None]:
    """Make one line of what Pillow raises, which is of many kinds, and let none of its warnings and logs out."""
    from PIL.Image import DecompressionBombError, DecompressionBombWarning

    logging.getLogger("PIL").addHandler(_UNHEARD)
    with _PILLOW, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", DecompressionBombWarning)
        try:
            yield
        except UsageError:
            raise
        except (DecompressionBombError, DecompressionBombWarning):
            raise _too_large(where) from None
        except MemoryError:
            raise UsageError(f"{where} is too large for the memory there is", "make it smaller first") from None
        except Exception as error:
            told = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"{where} is broken ({told})", "save or fetch it again") from None


def _too_large(where: str, size: tuple[int, int] | None = None) -> UsageError:
    found = f"{where} is {size[0]}x{size[1]} pixels, more" if size else f"{where} is more"
    return UsageError(f"{found} than {MOST_PIXELS / 1e6:.0f} million pixels", "make it smaller first")


def _upright(picture: Image, where: str) -> Image:
    """The pixels of a lazy picture, turned as its EXIF says."""
    from PIL import ImageOps

    if picture.width * picture.height > MOST_PIXELS:
        raise _too_large(where, picture.size)
    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # Broken EXIF; the pixels are fine.
        return picture


def _to_rgb(picture: Image, where: str) -> Image:
    """A loaded picture of any mode as RGB, or RGBA where it has transparency."""
    from PIL import Image

    if not picture.width or not picture.height:
        raise UsageError(f"{where} is {picture.width}x{picture.height} pixels", "give one with pixels")
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture)
        if picture.mode == "I":
            if values.min() < 0 or values.max() > 0xFFFF:
                raise UsageError(f"{where} has 32 bits a pixel", "convert it to 8 or 16 bits first")
            values = values.astype(np.uint16)
        picture = Image.fromarray(_bytes(values, where))
    transparent = picture.has_transparency_data
    if picture.mode == "La":
        picture = picture.convert("LA")
    wanted = "RGBA" if transparent else "RGB"
    return picture if picture.mode == wanted else picture.convert(wanted)


def _from_array(source: Any, name: str) -> Image:
    """An array or tensor as a picture of mode L, RGB or RGBA."""
    from PIL import Image

    is_tensor = hasattr(source, "detach")
    try:
        if is_tensor:
            source = source.detach().cpu()
            source = source.float() if source.is_floating_point() else source  # numpy has no bfloat16.
        values = np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{name} is no array of pixels ({error})", "give a numpy array or a torch tensor") from None
    if values.ndim == 4 and len(values) == 1:
        values = values[0]
    channels = (1, 3, 4)
    if is_tensor and values.ndim == 3 and values.shape[0] in channels:
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in channels):
        hint = "give (height, width) or (height, width, 1, 3 or 4)"
        raise UsageError(f"{name} is an array of shape {tuple(values.shape)}", hint)
    height, width = values.shape[:2]
    if not values.size:
        raise UsageError(f"{name} is {width}x{height} pixels", "give one with pixels")
    if height * width > MOST_PIXELS:
        raise _too_large(name, (width, height))
    levels = _bytes(values, name)
    return Image.fromarray(levels[..., 0] if levels.ndim == 3 and levels.shape[2] == 1 else levels)


def _bytes(values: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Numbers of pixels as uint8 0...255, rounded to the nearest."""
    if values.dtype == np.uint8:
        return np.array(values, order="C")  # Pillow shares memory with what it is given.
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        rounded: NDArray[np.uint8] = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return rounded
    if not np.issubdtype(values.dtype, np.floating):
        raise UsageError(f"{name} is of {values.dtype}", "give uint8, uint16, or floats from 0 to 1")
    if not np.isfinite(values).all():
        raise UsageError(f"{name} has NaN or Inf", "give floats from 0 to 1")
    low, high = float(values.min()), float(values.max())
    if low < -SLACK or high > 1 + SLACK:
        raise UsageError(f"{name} has numbers from {low:.4g} to {high:.4g}", "give floats from 0 to 1, or uint8")
    levels: NDArray[np.uint8] = (np.clip(values, 0, 1).astype(np.float32) * np.float32(255)).round().astype(np.uint8)
    return levels
