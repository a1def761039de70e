"""``zimg-export`` and ``zimg-run`` on a checkpoint that edits, and on LoRAs that are for a task."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.commands import invoke
from tests.references import checkpoints
from tests.runtime.test_from_pictures import mask, picture
from zimgkit.engines.bundle import Bundle
from zimgkit.export.cli.main import main as export
from zimgkit.runtime.commands.cli import main

SIZE = ("--width", 32, "--height", 32, "--num-inference-steps", 2, "--seed", 3, "--quiet")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(60, 40, 1).save("room.png")
    picture(30, 30, 2).save("chair.jpg", quality=95)
    mask(32, 32).save("left.png")
    return tmp_path


def test_several_pictures_and_again(bundle_of, here):
    bundle = bundle_of("qwen-image-edit-plus")
    options = ("--bundle", bundle, "--image", "room.png", "--image", "chair.jpg", *SIZE)
    found = invoke(main, "generate", "put it there", *options, "-o", "a.png", "--json")
    assert found.code == 0, found.err
    parameters = json.loads(found.out)["parameters"]
    assert [file["name"] for file in parameters["image"]] == ["room.png", "chair.jpg"]
    assert parameters["edit_image_auto_resize"] is True
    text = Image.open("a.png").text["parameters"]
    assert "room.png (" in text
    assert "chair.jpg (" in text
    again = invoke(main, "generate", "--from-image", "a.png", "--bundle", bundle, "-o", "b.png", "--quiet")
    assert again.code == 0, again.err
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "start"),
    [
        (("--image", "room.png", "--strength", "0.6"), None),
        (("--image", "room.png", "--mask", "left.png", "--image", "chair.jpg"), None),
        (("--image", "room.png", "--input-image", "chair.jpg", "--denoising-strength", "0.6"), "chair.jpg"),
        (("--image", "room.png", "--input-image", "chair.jpg", "--mask", "left.png"), "chair.jpg"),
    ],
)
def test_from_a_picture_and_again(bundle_of, here, options, start):
    bundle = bundle_of("qwen-image-edit-plus")
    found = invoke(main, "generate", "put it there", "--bundle", bundle, *options, *SIZE, "-o", "a.png", "--json")
    assert found.code == 0, found.err
    parameters = json.loads(found.out)["parameters"]
    assert (parameters["input_image"] or {}).get("name") == start if start else "input_image" not in parameters
    again = invoke(main, "generate", "--from-image", "a.png", "--bundle", bundle, "-o", "b.png", "--quiet")
    assert again.code == 0, again.err
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "there is no picture to edit"),
        (("--strength", "0.5"), "there is no picture to edit"),
        (("--image", "room.png", "--mask-blur", "2"), "mask_blur is given, and no mask"),
        (("--image", "room.png") * 4, "image has 4 pictures; this bundle takes 3 at most"),
        (("--image", "room.png", "--context-image", "room.png"), "built for edit, not for context"),
        (("--image", "room.png", "--entity", "a cup", "left.png"), "built for edit, not for regions"),
    ],
)
def test_bad_input(bundle_of, here, options, message):
    found = invoke(main, "generate", "x", "--bundle", bundle_of("qwen-image-edit-plus"), *options, *SIZE)
    found.assert_refused(message, 2)


def test_known_loras_bring_their_tasks(recorded_checkpoint_of, here):
    """By the name of their repository, as it stands in the path of their file."""
    checkpoint = recorded_checkpoint_of("qwen-image")
    for repository in ("Qwen-Image-In-Context-Control-Union", "Qwen-Image-EliGen-V2"):
        file = here / "DiffSynth-Studio" / repository / "model.safetensors"
        file.parent.mkdir(parents=True)
        checkpoints.write_lora(repository, checkpoint, file)
        options = ("--model", checkpoint, "--precision", "fp32", "--lora", file, "--quiet")
        assert invoke(export, "build", *options, "--out", repository).code == 0
    assert Bundle.open("Qwen-Image-In-Context-Control-Union").manifest.tasks == ("text-to-image", "context")
    assert Bundle.open("Qwen-Image-EliGen-V2").manifest.tasks == ("text-to-image", "regions")

    context = ("generate", "Context_Control. a cup", "--bundle", "Qwen-Image-In-Context-Control-Union")
    assert invoke(main, *context, "--context-image", "room.png", *SIZE, "-o", "a.png").code == 0
    assert invoke(main, *context, *SIZE, "-o", "plain.png").code == 0
    assert (np.asarray(Image.open("a.png")) != np.asarray(Image.open("plain.png"))).any()
    again = invoke(main, "generate", "--from-image", "a.png", *context[2:], "-o", "b.png", "--quiet")
    assert again.code == 0, again.err
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    warned = invoke(main, "generate", "a cup", *context[2:], "--context-image", "room.png", *SIZE, "-o", "c.png")
    assert "begin with 'Context_Control.'" in warned.err

    regions = ("--bundle", "Qwen-Image-EliGen-V2", "--entity", "a cup", "left.png", "--entity", "a bottle", "left.png")
    assert invoke(main, "generate", "a table", *regions, *SIZE, "-o", "d.png").code == 0
    again = invoke(main, "generate", "--from-image", "d.png", *regions[:2], "-o", "e.png", "--quiet")
    assert again.code == 0, again.err
    assert (here / "d.png").read_bytes() == (here / "e.png").read_bytes()
    Image.new("L", (8, 8)).save("black.png")
    black = invoke(main, "generate", "x", *regions[:2], "--entity", "a cup", "black.png", *SIZE, "-o", "f.png")
    black.assert_refused("the mask of entity 1 covers nothing", 2)
    assert not (here / "f.png").exists()


def test_a_checkpoint_that_edits_is_what_its_class_says(checkpoint_of, bundle_of, here):
    checkpoint, bundle = checkpoint_of("qwen-image-edit"), bundle_of("qwen-image-edit")
    found = json.loads(invoke(export, "inspect", checkpoint, "--json").out)
    assert found["tasks"] == ["edit"]
    assert {"vision_encoder", "vae_encoder"} <= found["components"].keys()
    manifest = Bundle.open(bundle).manifest
    assert (manifest.defaults.width, manifest.references.most) == (1024, 1)
    verified = invoke(export, "verify", bundle, "--model", checkpoint, "--json")
    assert verified.code == 0, verified.err
    components = json.loads(verified.out)["components"]
    for name in ("vision_encoder", "text_encoder.pictures", "denoiser.conditions"):
        assert components[name]["relative_max_error"] < 1e-4


@pytest.mark.parametrize("precision", ["int8-weights", "int8", "fp8"])
def test_it_is_quantized(checkpoint_of, bundle_of, here, precision):
    """Weights alone, whose cost is measured on pictures, and with inputs that were calibrated on them."""
    build = ("build", "--model", checkpoint_of("qwen-image-edit"), "--precision", precision, "--quiet", "--out", "q")
    if precision == "int8-weights":
        (here / "one.txt").write_text("make it blue\n")
        build += ("--measure", "--cost-size", "32x32", "--cost-steps", 1, "--cost-prompts", "one.txt")
        refused = invoke(export, *build)
        refused.assert_refused("is measured on pictures; name some with --calibration-image", 2)
        build += ("--calibration-image", "room.png")
    else:
        small = ("--calibration-size", "32x32", "--calibration-steps", 2)
        refused = invoke(export, *build, *small)
        refused.assert_refused("is calibrated on pictures; name some with --calibration-image", 2)
        (here / "words.txt").write_text("make it blue\na cat\nno cup\ntwo of them\n")
        build = (*build, *small, "--calibration", "words.txt", "--calibration-image", "room.png")
    found = invoke(export, *build)
    assert found.code == 0, found.err
    cost = Bundle.open(here / "q").manifest.cost
    if precision == "int8-weights":
        assert (cost.prompts, cost.width, len(cost.difference.velocity_cosine)) == (("make it blue",), 32, 1)
        assert 0.9 < cost.cosine < 1
    call = ("generate", "make it blue", "--image", "room.png", *SIZE)
    for bundle, out in (("q", "q.png"), (bundle_of("qwen-image-edit"), "f.png")):
        assert invoke(main, *call, "--bundle", bundle, "-o", out).code == 0
    ours, exact = (np.asarray(Image.open(file)).astype(float) for file in ("q.png", "f.png"))
    assert 0 < np.abs(ours - exact).mean() < 12
