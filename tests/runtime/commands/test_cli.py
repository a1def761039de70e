"""``zimg-run`` as a user types it: pictures, their parameters, and every wrong call in one line."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.commands import invoke
from zimgkit.engines.bundle import MANIFEST
from zimgkit.engines.choice import Choice
from zimgkit.runtime import Pipeline, session
from zimgkit.runtime.commands.cli import main
from zimgkit.runtime.pictures.metadata import Parameters, read
from zimgkit.runtime.pictures.saving import save

SMALL = ("--height", 32, "--width", 48, "--num-inference-steps", 2, "--quiet")


@pytest.fixture(scope="module", params=["z-image", "qwen-image"])
def bundle(request, bundle_of):
    return bundle_of(request.param)


def generate(bundle, *arguments):
    return invoke(main, "generate", "--bundle", bundle, *SMALL, *arguments)


def test_generate(bundle, tmp_path):
    out = tmp_path / "cat.png"
    result = generate(bundle, "--prompt", "a cat", "--seed", 3, "--output", out)
    assert (result.code, result.err) == (0, "")
    assert result.out == f"{out}  seed 3\n"
    with Pipeline.open(bundle) as pipeline:
        negative = pipeline.bundle.manifest.defaults.negative_prompt
        expected = pipeline("a cat", negative_prompt=negative, height=32, width=48, num_inference_steps=2, seed=3)
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected.images[0]))


def test_the_parameters_text_is_what_viewers_read(bundle, tmp_path):
    out = tmp_path / "cat.png"
    generate(bundle, "--prompt", "a cat", "--negative-prompt", "a dog", "--cfg-scale", 3, "--seed", 3, "--output", out)
    text = Image.open(out).text["parameters"]
    assert text.startswith(
        "a cat\nNegative prompt: a dog\nSteps: 2, Sampler: Euler, CFG scale: 3, Seed: 3, Size: 48x32, "
    )


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_from_image_makes_the_picture_again(bundle, tmp_path, ending):
    first, second = tmp_path / f"first.{ending}", tmp_path / f"second.{ending}"
    prompt = 'a "cat", Steps: 3\nNegative prompt: not one, 猫'
    arguments = ("--negative-prompt", "blurry", "--guidance-scale", 2.5, "--seed", 2**33 + 1)
    assert generate(bundle, "--prompt", prompt, *arguments, "--output", first).code == 0
    result = invoke(main, "generate", "--bundle", bundle, "--from-image", first, "--output", second, "--quiet")
    assert (result.code, result.err) == (0, "")
    assert read(first) == read(second)
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(second)))


def test_from_image_with_changes(bundle, tmp_path):
    first, second, plain = tmp_path / "1.png", tmp_path / "2.png", tmp_path / "3.png"
    generate(bundle, "--prompt", "a cat", "--seed", 5, "--output", first)
    arguments = ("--bundle", bundle, "--quiet", "--prompt", "a dog")
    invoke(main, "generate", *arguments, "--from-image", first, "--output", second)
    generate(bundle, "--prompt", "a dog", "--seed", 5, "--output", plain)
    assert np.array_equal(np.asarray(Image.open(second)), np.asarray(Image.open(plain)))


def test_several_pictures_are_numbered_and_each_can_be_made_again_alone(bundle, tmp_path):
    out = tmp_path / "cat.png"
    result = generate(bundle, "--prompt", "a cat", "--seed", 1, "--num-images", 3, "--output", out, "--json")
    report = json.loads(result.out)
    assert [entry["path"] for entry in report["images"]] == [str(tmp_path / f"cat-{i}.png") for i in (1, 2, 3)]
    assert report["parameters"]["num_inference_steps"] == 2
    assert not out.exists()
    third = tmp_path / "cat-3.png"
    again = tmp_path / "again.png"
    invoke(main, "generate", "--bundle", bundle, "--from-image", third, "--output", again, "--quiet")
    assert np.array_equal(np.asarray(Image.open(third)), np.asarray(Image.open(again)))
    assert not np.array_equal(np.asarray(Image.open(third)), np.asarray(Image.open(tmp_path / "cat-1.png")))


def test_both_backends_draw_the_same(bundle, tmp_path):
    pictures = []
    for backend in ("onnxruntime", "torch"):
        out = tmp_path / f"{backend}.png"
        arguments = ("--prompt", "a cat", "--seed", 1, "--backend", backend, "--device", "cpu", "--output", out)
        assert generate(bundle, *arguments).code == 0
        pictures.append(np.asarray(Image.open(out)).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_inspect(bundle):
    text = invoke(main, "inspect", bundle)
    assert text.code == 0
    assert "denoiser" in text.out
    summary = json.loads(invoke(main, "inspect", bundle, "--json").out)
    assert summary["family"] in ("z-image", "qwen-image")
    assert summary["components"]["denoiser"]["parameters"] > 100_000


def test_a_prompt_that_is_cut_is_said(bundle, tmp_path):
    result = generate(bundle, "--prompt", "cat " * 300, "--seed", 1, "--output", tmp_path / "o.png")
    assert result.code == 0
    assert result.err == "warning: the prompt has more than 512 tokens; the rest is not read\n"


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        ((), "there is nothing to draw; give --prompt TEXT", 2),
        (("--prompt", ""), "there is nothing to draw; give --prompt TEXT", 2),
        (("--prompt", "x" * 100_001), "prompt has 100,001 characters", 2),
        (("--prompt", "a", "--height", 100), "height is 100, not a multiple of 16; the nearest that is: 96", 2),
        (("--prompt", "a", "--width", 10_000), "width is 10000; give a number from 16 to 8192", 2),
        (("--prompt", "a", "--num-inference-steps", 0), "num_inference_steps is 0; give a number from 1", 2),
        (("--prompt", "a", "--num-images", 0), "num_images_per_prompt is 0", 2),
        (("--prompt", "a", "--seed", "x"), "'x' is not a valid integer", 2),
        (("--prompt", "a", "--seed", 2**70), "seed is", 2),
        (("--prompt", "a", "--guidance-scale", "nan"), "guidance_scale is nan", 2),
        (("--prompt", "a", "--guidance-scale", 1, "--cfg-scale", 1), "names for one thing", 2),
        (("--prompt", "a", "--backend", "magic"), "'magic' is not one of", 2),
        (("--prompt", "a", "--device", "tpu"), "no device 'tpu'", 2),
        (("--prompt", "a", "--device", "cuda"), "CUDA", 1),
        (("--prompt", "a", "--output", "o.gif"), "o.gif names no format zimgkit writes", 2),
        (("--prompt", "a", "--output", "no/such/folder/o.png"), "the folder no/such/folder does not exist", 1),
        (("--from-image", "missing.png"), "missing.png does not exist", 2),
        (("--from-image", __file__), "is no picture", 2),
        (("--colour", "red"), "No such option '--colour'; see zimg-run generate --help", 2),
    ],
)
def test_wrong_calls(bundle, tmp_path, monkeypatch, arguments, message, code):
    monkeypatch.chdir(tmp_path)
    generate(bundle, *arguments).assert_refused(message, code)
    assert list(tmp_path.iterdir()) == []


def test_not_a_bundle(tmp_path):
    missing = tmp_path / "missing"
    generate(missing, "--prompt", "a").assert_refused("is not a bundle: it has no bundle.json", 1)
    invoke(main, "inspect", tmp_path).assert_refused("is not a bundle: it has no bundle.json", 1)
    (tmp_path / MANIFEST).write_text("{")
    invoke(main, "inspect", tmp_path).assert_refused("is not a manifest zimgkit can read", 1)


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def test_a_changed_byte(copy, tmp_path):
    weights = next((copy / "transformer").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    result = generate(copy, "--prompt", "a", "--output", tmp_path / "o.png")
    result.assert_refused(f"{weights} was changed: its hash is not the manifest's; copy or build the bundle again", 1)


def test_a_missing_file(copy):
    (copy / "denoiser.onnx").unlink()
    generate(copy, "--prompt", "a").assert_refused("denoiser.onnx is missing; copy or build the bundle again", 1)


def test_a_shortened_file(copy):
    graph = copy / "denoiser.onnx"
    graph.write_bytes(graph.read_bytes()[:-10])
    generate(copy, "--prompt", "a").assert_refused("bytes; copy or build the bundle again", 1)


def change_manifest(copy, **changes):
    path = copy / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_newer_schema(copy):
    change_manifest(copy, schema_version=99)
    generate(copy, "--prompt", "a").assert_refused(
        "has schema version 99, and this zimgkit reads up to 2; upgrade zimgkit", 1
    )


def test_a_family_of_the_future(copy):
    change_manifest(copy, family="flux-9")
    generate(copy, "--prompt", "a").assert_refused("of family 'flux-9', and this zimgkit knows z-image, qwen-image", 1)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "tokenizer/../../x"])
def test_paths_that_leave_the_bundle(copy, name):
    files = json.loads((copy / MANIFEST).read_text())["files"]
    change_manifest(copy, files=files | {name: {"size": 1, "sha256": "0" * 64}})
    generate(copy, "--prompt", "a").assert_refused("leads out of the bundle", 1)


def test_from_a_picture_of_another_model(bundle, copy, tmp_path):
    change_manifest(copy, name="Another")
    first = tmp_path / "first.png"
    generate(bundle, "--prompt", "a", "--seed", 1, "--output", first)
    result = invoke(
        main, "generate", "--bundle", copy, "--from-image", first, "--output", tmp_path / "second.png", "--quiet"
    )
    assert result.code == 0
    assert "and this bundle is Another" in result.err


def test_the_prompt_is_an_argument_too(bundle, tmp_path):
    first, second, third = (tmp_path / f"{number}.png" for number in range(3))
    generate(bundle, "a cat", "--seed", 3, "-o", first)
    generate(bundle, "--prompt", "a cat", "--seed", 3, "--output", second)
    generate(bundle, "-p", "a cat", "--seed", 3, "-o", third)
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    generate(bundle, "a cat", "--prompt", "a dog").assert_refused("the prompt is given twice; leave --prompt out", 2)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--steps", "use --num-inference-steps"),
        ("--guidance", "use --guidance-scale"),
        ("--n", "use --num-images"),
        ("--widht", "did you mean --width?"),
        ("--zzzz", "see zimg-run generate --help"),
        ("--true-cfg-scale", "did you mean --cfg-scale?"),
    ],
)
def test_what_serves_instead_of_an_option(option, hint):
    result = invoke(main, "generate", "a", option, 3)
    result.assert_refused(f"No such option {option!r}; ", 2)
    assert hint in result.err


@pytest.mark.parametrize("short", ["-h", "--help"])
def test_short_help(short):
    assert "TEXT" in invoke(main, "generate", short).out
    assert invoke(main, "-V").out == invoke(main, "--version").out


def test_a_negative_prompt_without_guidance_and_a_lora_tag_are_said(bundle, tmp_path):
    off = ("--cfg-scale", 1, "--seed", 1, "--output", tmp_path / "o.png")
    result = generate(bundle, "a cat <lora:style:0.8>", "--negative-prompt", "blurry", *off)
    assert result.code == 0
    first, second = result.err.splitlines()
    assert first.startswith("warning: the negative prompt is not read, for guidance is off")
    assert second.startswith("warning: <lora:...> in a prompt is read as words")
    assert generate(bundle, "a cat", "--negative-prompt", " ", *off).err == ""


def test_a_picture_that_says_odd_things(bundle, tmp_path):
    """Of noise drawn together, but no seed; of sizes that cannot be; of a model whose name commands terminals."""
    odd = {"prompt": "a cat", "num_images": 900, "image_index": 899, "model": "x\x1b]0;evil\x07\x9b"}
    save(Image.new("RGB", (8, 8)), tmp_path / "odd.png", Parameters(**odd))
    result = generate(bundle, "--from-image", tmp_path / "odd.png", "--output", tmp_path / "o.png")
    assert result.code == 0
    assert "was made by x\\x1b]0;evil\\x07\\x9b, and this bundle" in result.err
    save(Image.new("RGB", (8, 8)), tmp_path / "odd.png", Parameters(**odd, seed=3, height=-16, width=16))
    arguments = ("--bundle", bundle, "--from-image", tmp_path / "odd.png", "--output", tmp_path / "o.png")
    refused = invoke(main, "generate", *arguments, "--quiet")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.splitlines()[-1] == "zimg-run: error: height is -16; give a number from 16 to 8192"


def test_the_backend_that_was_chosen_is_told(tmp_path, monkeypatch):
    small = ("--height", 16, "--width", 16, "--num-inference-steps", 1, "--json", "--output", tmp_path / "a.png")
    shown = invoke(main, "generate", "a", *small)
    chosen = json.loads(shown.out)["backend"]
    assert chosen == {"name": "onnxruntime", "reason": "so small a model is opened fastest"}
    assert shown.err == ""
    monkeypatch.setattr(session, "choose_backend", lambda *_: Choice("onnxruntime", "another one is missing"))
    assert invoke(main, "generate", "a", *small).err == "onnxruntime: another one is missing\n"
    assert invoke(main, "generate", "a", *small, "--quiet").err == ""
    named = invoke(main, "generate", "a", *small, "--backend", "onnxruntime")
    assert (named.err, json.loads(named.out)["backend"]["reason"]) == ("", "it was asked for")


@pytest.mark.parametrize("bundle", ["./owner/name", "owner/name/", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_a_hub(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invoke(main, "inspect", bundle).assert_refused("is not a bundle: it has no bundle.json", 1)
