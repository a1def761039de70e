"""Pictures of all kinds against Pillow's and diffusers' own conversions; what is none is told in one line."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import load_image
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from zimgkit.engines.errors import UsageError
from zimgkit.runtime.pictures.reading import MOST_PIXELS, digest, flattened, read_picture

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
RGBA = Image.fromarray(PIXELS)
RGB = Image.fromarray(PIXELS[..., :3])
DEEP = np.arange(0, 65536, 257 * 3 + 1, dtype=np.uint16)[None].repeat(4, 0)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int = 8, color: int = 2) -> bytes:
    """A file that promises this many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_opaque_files_are_read_as_by_diffusers(tmp_path: Path, kind: str, mode: str) -> None:
    path = tmp_path / "picture"
    try:
        RGB.convert(mode).save(path, kind)
    except (OSError, ValueError):
        return  # No such files.
    found = read_picture(path)
    assert found.mode == "RGB"
    assert np.array_equal(found, load_image(str(path)))
    for source in (str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), path.open("rb"), Image.open(path)):
        assert np.array_equal(read_picture(source), found)


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "RGBX"])
def test_other_modes(mode: str) -> None:
    picture = RGB.convert(mode) if mode != "LAB" else Image.merge("LAB", RGB.split())
    assert read_picture(picture).mode == "RGB"
    assert np.array_equal(read_picture(picture), picture.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_is_kept(mode: str) -> None:
    picture = RGBA.convert("LA").convert(mode) if mode == "La" else RGBA.convert(mode)
    picture.putalpha(RGBA.getchannel("A")) if mode == "PA" else None
    found = read_picture(picture)
    assert found.mode == "RGBA"
    assert np.array_equal(np.asarray(found)[..., 3], PIXELS[..., 3])


@pytest.mark.parametrize("transparency", [0, b"\x00\x80\xff"], ids=["index", "of each index"])
def test_palettes_with_transparency(transparency: int | bytes) -> None:
    picture = Image.new("P", (3, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.putdata([0, 1, 2])
    found = read_picture(encoded(picture, transparency=transparency))
    assert found.mode == "RGBA"
    alphas = [0, 128, 255] if isinstance(transparency, bytes) else [0, 255, 255]
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert np.asarray(found)[0].tolist() == [[*color, alpha] for color, alpha in zip(colors, alphas, strict=True)]


def test_a_transparent_color() -> None:
    picture = Image.new("RGB", (2, 1), (9, 8, 7))
    picture.putpixel((1, 0), (1, 2, 3))
    found = read_picture(encoded(picture, transparency=(1, 2, 3)))
    assert np.asarray(found)[0].tolist() == [[9, 8, 7, 255], [1, 2, 3, 0]]


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(DEEP),
        Image.frombytes("I;16B", DEEP.shape[::-1], DEEP.astype(">u2").tobytes()),
        Image.fromarray(DEEP.astype(np.int32)),
        encoded(Image.fromarray(DEEP)),
        encoded(Image.fromarray(DEEP), "TIFF"),
        encoded(Image.frombytes("I;16B", DEEP.shape[::-1], DEEP.astype(">u2").tobytes()), "TIFF"),
        DEEP,
        DEEP.astype(">u2"),
        Image.fromarray(DEEP.astype(np.float32) / 65535),
    ],
    ids=["I;16", "I;16B", "I", "PNG", "TIFF", "big-endian TIFF", "array", "big-endian array", "F"],
)
def test_sixteen_bits_are_scaled(picture: Any) -> None:
    expected = (DEEP / 257).round().astype(np.uint8)
    assert np.array_equal(np.asarray(read_picture(picture)), np.stack([expected] * 3, -1))


def test_cmyk_as_adobe_writes_it() -> None:
    """Inverted, with a marker that Pillow writes too."""
    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    data = encoded(inks, "JPEG", quality=95)
    assert b"Adobe" in data[:200]
    for source in (data, encoded(inks, "TIFF"), inks):
        assert np.abs(np.asarray(read_picture(source), int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_in_exif(orientation: int) -> None:
    array = np.asarray(RGB)
    turned = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.swapaxes(0, 1),
        6: np.rot90(array, -1),
        7: array[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(array),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = encoded(RGB, kind, exif=exif, **options)
        assert np.array_equal(read_picture(data), turned[orientation])
        assert np.array_equal(read_picture(Image.open(io.BytesIO(data))), turned[orientation])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_animations(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(flattened(read_picture(data)), int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize(
    "array",
    [
        PIXELS[..., :3],
        PIXELS[None, ..., :3],
        np.asfortranarray(PIXELS[..., :3]),
        PIXELS[..., :3] / 255,
        (PIXELS[..., :3] / 255).astype(np.float32),
        PIXELS[..., :3].astype(np.float32) / 255 + 1e-4 * (PIXELS[..., :3] == 255),
        PIXELS[..., :3].astype(np.uint16) * 257,
        torch.from_numpy(PIXELS[..., :3].copy()),
        torch.from_numpy(PIXELS[..., :3].copy()).permute(2, 0, 1),
        (torch.from_numpy(PIXELS[..., :3].copy()).permute(2, 0, 1)[None] / 255).requires_grad_(),
    ],
)
def test_arrays_and_tensors(array: Any) -> None:
    found = read_picture(array)
    assert found.mode == "RGB"
    assert np.array_equal(found, RGB)


def test_arrays_of_other_channels() -> None:
    grey = PIXELS[..., 0]
    for array in (grey, grey[..., None], grey / 255, torch.from_numpy(grey.copy())[None]):
        assert np.array_equal(read_picture(array), np.stack([grey] * 3, -1))
    assert np.array_equal(read_picture(PIXELS), RGBA)
    assert np.array_equal(read_picture(grey > 99), np.stack([(grey > 99) * np.uint8(255)] * 3, -1))
    half = torch.full((3, 4, 4), 0.5, dtype=torch.bfloat16)
    assert read_picture(half).getpixel((0, 0)) == (128, 128, 128)


def test_flattened_is_over_white_as_in_transformers() -> None:
    assert np.array_equal(flattened(RGBA), convert_to_rgb(RGBA, return_numpy=True))
    assert np.array_equal(flattened(RGB), RGB)
    assert flattened(Image.new("RGBA", (1, 1))).getpixel((0, 0)) == (255, 255, 255)


def test_digest_is_of_what_is_seen() -> None:
    assert digest(read_picture(encoded(RGB))) == digest(read_picture(encoded(RGB, "BMP"))) == digest(RGB)
    other = RGB.copy()
    other.putpixel((0, 0), tuple(255 - value for value in RGB.getpixel((0, 0))))
    turned = Image.frombytes("RGB", RGB.size[::-1], RGB.tobytes())
    assert len({digest(found) for found in (RGB, RGBA, other, turned)}) == 4


def test_the_callers_picture_is_its_own() -> None:
    picture = RGBA.copy()
    found = read_picture(picture)
    flattened(picture)
    assert picture == RGBA
    array = PIXELS.copy()
    copied = read_picture(array)
    picture.putpixel((0, 0), (1, 2, 3, 4))
    array[:] = 0
    assert found == copied == RGBA


HEIC, MOVIE = b"\0\0\0\x18ftypheic\0\0\0\0", b"\0\0\0\x18ftypisom\0\0\0\0"
BAD = {
    "missing": ("/nowhere/cat.png", "image /nowhere/cat.png does not exist"),
    "folder": (".", "image . is a folder"),
    "empty path": ("", "empty path"),
    "below a file": (f"{__file__}/cat.png", "cannot be read"),
    "zero in a path": ("a\0b.png", r"image a\?b.png cannot be read"),
    "lines in a path": (Path("a\nb.png"), r"image a\?b.png does not exist"),
    "long path": ("a" * 5000, "cannot be read"),
    "address": ("https://example.org/cat.png", "is an address; download it first"),
    "endless": ("/dev/zero", "more than 512 MB"),
    "empty file": ("/dev/null", "is empty"),
    "no bytes": (b"", "image is empty"),
    "noise": (RNG.bytes(500), "no picture that can be read"),
    "text": (b"hello", "no picture that can be read"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing; convert it"),
    "SVG with a head": (b'<?xml version="1.0"?>\n<!-- x -->\n<!DOCTYPE svg>\n<svg>', "an SVG drawing; convert it"),
    "HEIC": (HEIC, "a HEIC photo; convert it"),
    "video": (MOVIE, "a video; convert it"),
    "PDF": (b"%PDF-1.7\n", "a PDF; convert it"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript file; convert it"),
    "cut PNG": (encoded(RGB)[:80], r"broken \(image file is truncated\)"),
    "cut header": (encoded(RGB)[:30], "or broken"),
    "cut JPEG": (encoded(RGB, "JPEG")[:-60], "is broken"),
    "cut WebP": (encoded(RGB, "WEBP")[:60], "broken"),
    "bomb": (png(60000, 60000), "million pixels; make it smaller"),
    "small bomb": (png(9000, 9000, 1, 0), "is 9000x9000 pixels, more than 67 million"),
    "no width": (png(0, 5), "broken"),
    "picture of nothing": (Image.new("RGB", (0, 5)), "0x5 pixels"),
    "large array": (np.broadcast_to(np.uint8(0), (1, MOST_PIXELS + 1)), "million pixels"),
    "array of nothing": (np.zeros((4, 0, 3)), "0x4 pixels"),
    "one axis": (np.zeros(4), r"array of shape \(4,\)"),
    "two channels": (np.zeros((4, 4, 2)), r"array of shape \(4, 4, 2\)"),
    "several": (np.zeros((2, 4, 4, 3)), r"array of shape \(2, 4, 4, 3\)"),
    "NaN": (np.full((4, 4), np.nan), "has NaN or Inf"),
    "Inf": (torch.full((3, 4, 4), torch.inf), "has NaN or Inf"),
    "-1 ... 1": (np.linspace(-1, 1, 16).reshape(4, 4), "has numbers from -1 to 1; give floats from 0 to 1"),
    "0 ... 255": (np.full((4, 4), 255.0), "has numbers from 255 to 255"),
    "integers": (np.zeros((4, 4), np.int64), "is of int64; give uint8"),
    "objects": (np.array([[None]]), "is of object"),
    "complex": (np.zeros((4, 4), complex), "is of complex128"),
    "32 bits": (Image.new("I", (2, 2), 70000), "32 bits a pixel"),
    "number": (3, "is of type int"),
    "nothing": (None, "is of type NoneType"),
    "list": ([RGB], "is of type list"),
    "text file": (io.StringIO("x"), "a file of text"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    source, message = BAD[name]
    with warnings.catch_warnings(record=True) as heard, pytest.raises(UsageError, match=message) as error:
        warnings.simplefilter("always")
        read_picture(source)
    assert "\n" not in str(error.value)
    assert error.value.hint
    assert not heard
    assert capfd.readouterr() == ("", "")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(UsageError, match="mask cannot be read"):
        read_picture(closed, "mask")
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    with pytest.raises(UsageError, match="cannot be read"):
        read_picture(loop)


def test_a_pipe_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(pipe.write_bytes, encoded(RGB))
        assert np.array_equal(read_picture(pipe), RGB)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A file that was cut, or of which some bytes were changed."""
    if rng.random() < 0.3:
        return data[: rng.integers(len(data))]
    changed = bytearray(data)
    for place in rng.integers(0, len(data), rng.integers(1, 6)):
        changed[place] = rng.integers(256)
    return bytes(changed)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI"])
def test_damaged_files(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    try:
        data = encoded(RGB, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(40):
            try:
                assert read_picture(damaged(data, rng)).mode in ("RGB", "RGBA")
            except UsageError as error:
                assert "\n" not in str(error)
    assert not heard
    assert capfd.readouterr() == ("", "")


def test_many_at_once() -> None:
    """Pictures are right, and the filters of warnings are as they were."""
    before = list(warnings.filters)

    def bomb() -> bool:
        with pytest.raises(UsageError, match="million pixels"):
            read_picture(png(60000, 60000))
        return True

    jobs: list[Callable[[], Any]] = []
    for index in range(60):
        jobs.append(lambda index=index: read_picture(np.full((2, 2), index, np.uint8)).getpixel((0, 0))[0] == index)
        jobs.append(lambda: np.array_equal(read_picture(encoded(RGBA)), RGBA))
        jobs.append(bomb)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda job: job(), jobs))
    assert warnings.filters == before
