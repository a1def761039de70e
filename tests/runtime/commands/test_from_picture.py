"""``zimg-run generate`` from a picture, and again from what it drew."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.commands import invoke
from zimgkit.runtime.commands.cli import main

CALL = ("generate", "a cat", "--num-inference-steps", "2", "--seed", "3", "--quiet")


@pytest.fixture
def bundle(bundle_of):
    return str(bundle_of("z-image", tasks=("image-to-image", "inpaint")))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a photo and a mask of its right half."""
    monkeypatch.chdir(tmp_path)
    y, x = np.mgrid[0:48, 0:64]
    pixels = np.stack([x * 4, y * 5, 255 - x * 3], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save("photo.png")
    Image.fromarray(np.where(x < 32, 0, 255).astype(np.uint8)).save("mask.png")
    return tmp_path


def pixels(path):
    return np.asarray(Image.open(path))


def test_it_is_drawn_again_from_what_it_carries(bundle, here):
    found = invoke(
        main, *CALL, "--bundle", bundle, "--image", "photo.png", "--strength", "0.7", "--json", "-o", "a.png"
    )
    assert found.code == 0, found.err
    parameters = json.loads(found.out)["parameters"]
    assert [file["name"] for file in parameters["image"]] == ["photo.png"]
    assert len(parameters["image"][0]["sha256"]) == 64
    assert (parameters["strength"], parameters["width"], parameters["height"]) == (0.7, 64, 48)
    text = Image.open("a.png").text["parameters"]
    assert f"Input image: photo.png ({parameters['image'][0]['sha256'][:10]})" in text
    again = invoke(main, "generate", "--from-image", "a.png", "--bundle", bundle, "-o", "b.png", "--quiet")
    assert again.code == 0, again.err
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()


def test_pixels_outside_the_mask_stay(bundle, here):
    assert (
        invoke(main, *CALL, "--bundle", bundle, "--image", "photo.png", "--mask", "mask.png", "-o", "a.png").code == 0
    )
    np.testing.assert_array_equal(pixels("a.png")[:, :32], pixels("photo.png")[:, :32])
    assert np.abs(pixels("a.png")[:, 32:].astype(int) - pixels("photo.png")[:, 32:]).max() > 10
    options = ("--image", "photo.png", "--mask", "mask.png", "--redraw-unmasked", "-o", "b.png")
    assert invoke(main, *CALL, "--bundle", bundle, *options).code == 0
    assert (pixels("b.png")[:, :32] != pixels("photo.png")[:, :32]).any()


def test_a_picture_that_is_gone_is_asked_for(bundle, here):
    assert invoke(main, *CALL, "--bundle", bundle, "--image", "photo.png", "-o", "a.png").code == 0
    (here / "photo.png").rename(here / "moved.png")
    again = ("generate", "--from-image", "a.png", "--bundle", bundle, "-o", "b.png", "--quiet")
    found = invoke(main, *again)
    assert found.code == 2
    assert "drawn from photo.png (" in found.err
    assert "give --image PICTURE" in found.err
    assert not (here / "b.png").exists()
    assert invoke(main, *again, "--image", "moved.png").code == 0
    assert pixels("a.png").tobytes() == pixels("b.png").tobytes()


def test_another_picture_is_told_of(bundle, here):
    assert invoke(main, *CALL, "--bundle", bundle, "--image", "photo.png", "-o", "a.png").code == 0
    Image.new("RGB", (64, 48), "red").save("red.png")
    found = invoke(main, "generate", "--from-image", "a.png", "--bundle", bundle, "--image", "red.png", "-o", "b.png")
    assert found.code == 0
    assert "a.png was drawn from another image: photo.png" in found.err


def test_a_name_in_a_picture_cannot_lead_elsewhere(bundle, here):
    """A hostile picture names a file by its path: only what lies beside it is looked at."""
    from zimgkit.runtime.pictures.metadata import InputFile, Parameters
    from zimgkit.runtime.pictures.saving import save

    (here / "beside").mkdir()
    record = Parameters(prompt="x", image=(InputFile("../photo.png", "0" * 64),), strength=0.5)
    save(Image.new("RGB", (16, 16)), here / "beside" / "a.png", record)
    found = invoke(main, "generate", "--from-image", "beside/a.png", "--bundle", bundle, "-o", "b.png")
    assert found.code == 2
    assert "not beside it" in found.err


def test_a_strength_without_its_picture_is_not_taken_over(bundle, here):
    """As A1111 writes it of an upscaled picture."""
    from PIL import PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(
        "parameters", "a cat\nSteps: 2, Sampler: Euler, CFG scale: 1, Seed: 1, Size: 32x32, Denoising strength: 0.4"
    )
    Image.new("RGB", (16, 16)).save("web.png", pnginfo=chunks)
    assert invoke(main, "generate", "--from-image", "web.png", "--bundle", bundle, "-o", "b.png", "--quiet").code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mask", "mask.png"), "mask_image is given, and no image"),
        (("--image", "none.png"), "image none.png does not exist"),
        (("--image", "photo.png", "--strength", "2"), "strength is 2"),
        (("--image", "text.png"), "no picture that can be read"),
    ],
)
def test_bad_input(bundle, here, options, message):
    (here / "text.png").write_text("no picture")
    found = invoke(main, *CALL, "--bundle", bundle, *options)
    assert found.code == 2
    assert message in found.err
    assert found.err.count("\n") == 1
