"""``zimg-run`` with a bundle that takes a picture apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.commands import invoke
from tests.runtime.test_layered import transparent
from zimgkit.runtime.commands.cli import main
from zimgkit.runtime.commands.generate import filled
from zimgkit.runtime.pictures.metadata import Parameters

SMALL = ("--width", "64", "--height", "48", "--num-inference-steps", "2", "--seed", "3", "--quiet")


@pytest.fixture
def bundle(bundle_of):
    return str(bundle_of("qwen-image-layered"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a picture."""
    monkeypatch.chdir(tmp_path)
    transparent(80, 60).save("cup.png")
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.*")} - {"cup.png"}


def test_layers_are_numbered_and_drawn_again_from_what_they_carry(bundle, here):
    asked = ("generate", "a cup", "--bundle", bundle, "--image", "cup.png", "--layers", "2", *SMALL)
    found = invoke(main, *asked, "--json", "-o", "a.png")
    assert found.code == 0, found.err
    assert names(here) == {"a-1.png", "a-2.png"}
    told = json.loads(found.out)
    assert [entry["path"] for entry in told["images"]] == ["a-1.png", "a-2.png"]
    assert (told["parameters"]["layers"], told["parameters"]["image"][0]["name"]) == (2, "cup.png")
    first, second = (Image.open(f"a-{number}.png") for number in (1, 2))
    assert (first.mode, first.size) == ("RGBA", (64, 48))
    assert (np.asarray(first) != np.asarray(second)).any()
    assert "Layers: 2" in second.text["parameters"]
    again = invoke(main, "generate", "--from-image", "a-2.png", "--bundle", bundle, "-o", "b.png", "--quiet")
    assert again.code == 0, again.err
    for number in (1, 2):
        assert (here / f"a-{number}.png").read_bytes() == (here / f"b-{number}.png").read_bytes()


def test_several_pictures_of_a_prompt(bundle, here):
    """Each is numbered, and then its layers; one of them is drawn again without the others."""
    asked = ("generate", "a cup", "--bundle", bundle, "--image", "cup.png", "--layers", "2", *SMALL)
    assert invoke(main, *asked, "--num-images", "2", "-o", "a.webp").code == 0
    assert names(here) == {f"a-{picture}-{layer}.webp" for picture in (1, 2) for layer in (1, 2)}
    again = ("generate", "--from-image", "a-2-1.webp", "--bundle", bundle, "--quiet", "-o", "b.webp")
    assert invoke(main, *again).code == 0
    for layer in (1, 2):
        assert (here / f"a-2-{layer}.webp").read_bytes() == (here / f"b-{layer}.webp").read_bytes()


def test_one_layer_has_the_name_that_was_given(bundle, here):
    asked = ("generate", "a cup", "--bundle", bundle, "--image", "cup.png", "--layers", "1", *SMALL)
    assert invoke(main, *asked, "-o", "a.png").code == 0
    assert names(here) == {"a.png"}


def test_a_page_shows_all_layers(bundle, here):
    (here / "prompts.txt").write_text("a cup\na table\n")
    asked = ("sheet", "prompts.txt", "--bundle", bundle, "--image", "cup.png", "--layers", "2", *SMALL)
    found = invoke(main, *asked, "-o", "page.png", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["width"] > 4 * 64


def test_another_resolution_takes_the_place_of_a_pictures_size():
    carried = Parameters(prompt="a cup", width=64, height=48, layers=2)
    assert filled({"resolution": 640}, carried, Path("a.png")) == {"prompt": "a cup", "layers": 2, "resolution": 640}
    assert filled({"layers": 3}, carried, Path("a.png"))["layers"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "there is no picture to take apart; give it as image"),
        (("--image", "cup.png", "--layers", "0"), "layers is 0; give a number from 1 to 64"),
        (("--image", "cup.png", "--resolution", "500"), "resolution is 500; choose one of 640, 1024"),
        (("--image", "cup.png", "--resolution", "640", "--width", "64"), "resolution and width are both given"),
        (("--image", "cup.png", "-o", "a.jpg"), "a-1.jpg: JPEG holds no transparency; end it with .png or .webp"),
        (("--image", "cup.png", "--prompt", " "), "the prompt is empty; say what the picture shows"),
        (("--image", "cup.png", "--strength", "0.5"), "strength is given, and this bundle takes whole pictures apart"),
    ],
)
def test_bad_input(bundle, here, options, message):
    prompt = () if "--prompt" in options else ("a cup",)
    found = invoke(main, "generate", *prompt, "--bundle", bundle, "--quiet", *options)
    assert found.code == 2
    assert message in found.err
    assert names(here) == set()


def test_other_bundles_take_no_picture_apart(bundle_of, here):
    found = invoke(main, "generate", "a cup", "--bundle", str(bundle_of("qwen-image")), "--layers", "2", "--quiet")
    assert found.code == 2
    assert "layers is given, and this bundle takes no picture apart" in found.err
