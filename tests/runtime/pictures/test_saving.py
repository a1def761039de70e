"""Pixels against diffusers' image processor, and files that are whole or absent."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from zimgkit.engines.errors import OutputError, UsageError
from zimgkit.runtime.pictures.metadata import Parameters
from zimgkit.runtime.pictures.saving import check_target, from_vae, save, to_pil

SHAPES = [(1, 3, 8, 8), (2, 3, 16, 24), (3, 3, 33, 7)]


def decoded(shape: tuple[int, ...]) -> np.ndarray:
    """More than the range -1 ... 1, and every boundary between two 8-bit levels."""
    values = np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)
    edges = ((np.arange(512, dtype=np.float32) / 2) / 255) * 2 - 1
    values.reshape(-1)[: min(512, values.size)] = edges[: values.size]
    return values


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_are_those_of_diffusers(shape: tuple[int, ...]) -> None:
    values = decoded(shape)
    processor = VaeImageProcessor(vae_scale_factor=16)
    ours = from_vae(values)
    theirs = processor.postprocess(torch.from_numpy(values), output_type="np")
    assert ours.dtype == theirs.dtype == np.float32
    assert np.array_equal(ours, theirs)
    pictures = processor.postprocess(torch.from_numpy(values), output_type="pil")
    for picture, expected in zip(to_pil(ours), pictures, strict=True):
        assert picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), np.asarray(expected))


@pytest.mark.parametrize(("suffix", "kind"), [(".png", "PNG"), (".jpg", "JPEG"), (".JPEG", "JPEG"), (".WebP", "WEBP")])
@pytest.mark.parametrize("parameters", [None, Parameters(prompt="a cat", seed=1)])
def test_save(tmp_path: Path, suffix: str, kind: str, parameters: Parameters | None) -> None:
    y, x = np.mgrid[0:64, 0:48] / 64
    smooth = np.stack([y, x, 1 - y], -1).astype(np.float32)
    (picture,) = to_pil(smooth[None])
    path = tmp_path / f"picture{suffix}"
    path.write_text("something older")
    save(picture, path, parameters)
    with Image.open(path) as found:
        assert found.format == kind
        assert found.size == (48, 64)
        difference = np.abs(np.asarray(found.convert("RGB"), int) - np.asarray(picture, int)).max()
    assert difference <= (0 if kind == "PNG" else 12)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


PICTURE = Image.new("RGB", (8, 8))


@pytest.mark.parametrize("name", ["picture", "picture.gif", "picture.png.txt", ".png", "picture."])
def test_an_unknown_ending(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"names no format zimgkit writes; end it with \.png, \.jpg, \.jpeg, \.webp"):
        save(PICTURE, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder(tmp_path: Path) -> None:
    for check in (check_target, lambda path: save(PICTURE, path)):
        with pytest.raises(OutputError, match=r"the folder .*lost does not exist; make it first"):
            check(tmp_path / "lost" / "picture.png")


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "picture.png").mkdir()
    with pytest.raises(OutputError, match=r"picture\.png is a folder"):
        save(PICTURE, tmp_path / "picture.png")


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(OutputError, match="cannot be written to"):
        check_target(tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device.*; free some space"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system.*; check the path"),
    ],
)
@pytest.mark.parametrize("at", ["write_bytes", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, message: str, at: str
) -> None:
    path = tmp_path / "picture.png"
    path.write_text("older")

    def fail(self: Path, *_: Any) -> None:
        self.touch()
        raise error

    monkeypatch.setattr(Path, at, fail)
    with pytest.raises(OutputError, match=message):
        save(PICTURE, path)
    assert path.read_text() == "older"
    assert [entry.name for entry in tmp_path.iterdir()] == ["picture.png"]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Path, *_: Any) -> None:
        self.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(PICTURE, tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())


def test_a_picture_too_large_for_its_format(tmp_path: Path) -> None:
    wide = Image.new("RGB", (16_400, 1))
    with pytest.raises(OutputError, match=r"WEBP cannot hold this 16400x1 picture .*; use \.png"):
        save(wide, tmp_path / "wide.webp")
    save(wide, tmp_path / "wide.png")
    assert [entry.name for entry in tmp_path.iterdir()] == ["wide.png"]
