"""Pictures to a LoRA: against what DiffSynth gave (``tests/references``), and bad input."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors

from tests.commands import invoke
from tests.references import recordings
from tests.references.cases import picture
from zimgkit.engines.errors import UsageError
from zimgkit.export.cli.main import main
from zimgkit.export.i2l.make import describe, make_lora
from zimgkit.export.i2l.models import read_dinov3, read_siglip
from zimgkit.export.i2l.running import Place
from zimgkit.runtime import hub
from zimgkit.runtime.pictures.squares import middle_square

CASES = recordings.names("z-image-i2l")


@pytest.fixture(scope="session")
def networks(recorded_i2l_of):
    return recorded_i2l_of("z-image")


def options(networks):
    return {
        "generator": str(networks / "i2l/model.safetensors"),
        "siglip": str(networks / "siglip"),
        "dinov3": str(networks / "dinov3/model.safetensors"),
    }


@pytest.fixture
def refused(networks, recorded_checkpoint_of, tmp_path):
    """``refused(message, …)``: the command is refused so, and leaves nothing behind."""
    files = tmp_path / "files"
    files.mkdir()
    picture(40, 30).save(files / "picture.png")

    def check(message, *pictures, code=1, model=None, out="out.safetensors", **changed):
        named = options(networks) | changed
        flags = {"generator": "--i2l", "siglip": "--siglip", "dinov3": "--dinov3", "memory": "--memory"}
        words = [word for key, value in named.items() for word in (flags[key], value)]
        target = tmp_path / "made" / out
        (tmp_path / "made").mkdir(exist_ok=True)
        before = sorted((tmp_path / "made").iterdir())
        found = pictures or (files / "picture.png",)
        result = invoke(
            main, "i2l", model or recorded_checkpoint_of("z-image"), *found, "-o", target, *words, "--quiet"
        )
        result.assert_refused(message, code)
        assert sorted((tmp_path / "made").iterdir()) == before

    return check


def changed(networks, name, folder, change):
    """The folder of one of the networks, after a change to its tensors."""
    shutil.copytree(networks / name, folder / name, dirs_exist_ok=True)
    tensors = load_file(networks / name / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / name / "model.safetensors")
    return folder / name


@pytest.mark.parametrize("name", CASES)
def test_what_the_encoders_say(name, networks, tmp_path):
    recorded = recordings.read(name)
    squares = [middle_square(own) for own in recorded.call["pictures"]]
    named = options(networks)
    encoders = read_siglip(named["siglip"], ""), read_dinov3(named["dinov3"], "")
    found = describe(*encoders, squares, Place("onnxruntime"), tmp_path)
    expected = recorded.arrays["picture_embeds"]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_as_diffsynth_makes_it(name, networks, recorded_checkpoint_of, tmp_path):
    recorded = recordings.read(name)
    out = tmp_path / "style.safetensors"
    made = make_lora(str(recorded_checkpoint_of("z-image")), recorded.call["pictures"], out, **options(networks))
    found = load_file(out)
    expected = {key.removeprefix("lora."): value for key, value in recorded.arrays.items() if key.startswith("lora.")}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == np.float32
        np.testing.assert_allclose(found[key], value, atol=1e-5 * np.abs(value).max(), err_msg=key)
    pictures = len(recorded.call["pictures"])
    assert (made.pictures, made.rank, made.modules) == (pictures, 4 * pictures, len(expected) // 2)
    with safe_open(out, "np") as file:
        assert file.metadata()["base_model"] == "recorded-z-image"
        assert file.metadata()["pictures"] == str(pictures)
    assert [path.name for path in tmp_path.iterdir()] == ["style.safetensors"]


def test_the_command(networks, recorded_checkpoint_of, tmp_path):
    """Files in, bfloat16 encoders over their own files, and a LoRA that a bundle of it takes."""
    paths = [tmp_path / "one.png", tmp_path / "two.webp"]
    for index, path in enumerate(paths):
        picture(50, 40, index).save(path)
    for name in ("siglip", "dinov3"):
        tensors = load_file(networks / name / "model.safetensors")
        shutil.copytree(networks / name, tmp_path / name)
        rounded = {key: torch.from_numpy(value).bfloat16() for key, value in tensors.items()}
        save_tensors(rounded, tmp_path / name / "model.safetensors")
    named = {"--i2l": networks / "i2l", "--siglip": tmp_path / "siglip", "--dinov3": tmp_path / "dinov3"}
    words = [word for pair in named.items() for word in pair]
    checkpoint, out = recorded_checkpoint_of("z-image"), tmp_path / "style.safetensors"
    result = invoke(main, "i2l", checkpoint, *paths, "-o", out, *words, "--json", "--quiet")
    assert result.code == 0, result
    assert json.loads(result.out) == {
        "path": str(out), "base": "recorded-z-image", "pictures": 2, "rank": 8, "modules": 28,
    }  # fmt: skip
    make_lora(str(checkpoint), paths, exact := tmp_path / "exact.safetensors", **options(networks))
    found, expected = load_file(out), load_file(exact)
    for key, value in expected.items():
        assert 0 < np.abs(found[key] - value).max() < 0.1 * np.abs(value).max()
    result = invoke(main, "i2l", checkpoint, paths[0], "-o", out, *words, "--overwrite")
    assert (result.code, out.stat().st_size < exact.stat().st_size) == (0, True)
    assert result.out == f"{out}  a LoRA of 1 picture for recorded-z-image: 28 modules of rank 4\n"


def test_from_a_hub_and_for_a_bundle(networks, recorded_checkpoint_of, recorded_bundle_of, tmp_path, monkeypatch):
    """The releases' own files are asked for where none are named; a bundle is a model as well."""
    hubs, asked = tmp_path / "hub", []
    for model, place, name in (
        ("Z-Image-i2L", "", "i2l"),
        ("General-Image-Encoders", "SigLIP2-G384", "siglip"),
        ("General-Image-Encoders", "DINOv3-7B", "dinov3"),
    ):
        shutil.copytree(networks / name, hubs / model / place, dirs_exist_ok=True)

    def fetch(model_id, revision=None, source="huggingface", allow=()):
        asked.append((source, model_id, *allow))
        return hubs / model_id.rpartition("/")[2]

    monkeypatch.setattr(hub, "fetch", fetch)
    bundle, pictures = recorded_bundle_of("z-image"), [picture(40, 30)]
    first = make_lora(str(bundle), pictures, tmp_path / "first.safetensors", source="modelscope").path
    assert asked == [
        ("modelscope", "DiffSynth-Studio/General-Image-Encoders", "SigLIP2-G384/model.safetensors"),
        ("modelscope", "DiffSynth-Studio/General-Image-Encoders", "DINOv3-7B/model.safetensors"),
        ("modelscope", "DiffSynth-Studio/Z-Image-i2L", "model.safetensors"),
    ]
    second = tmp_path / "second.safetensors"
    make_lora(str(recorded_checkpoint_of("z-image")), pictures, second, **options(networks))
    assert first.read_bytes() == second.read_bytes()
    told = invoke(main, "inspect", first, "--json")
    assert json.loads(told.out)["families"] == ["z-image"], told


def test_two_at_once(networks, recorded_checkpoint_of, tmp_path):
    checkpoint, pictures = str(recorded_checkpoint_of("z-image")), [picture(40, 30)]

    def make(name):
        return make_lora(checkpoint, pictures, tmp_path / name, **options(networks)).path.read_bytes()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(make, ("one.safetensors", "two.safetensors"))
    assert first == second


class TestBadInput:
    """One line each, and nothing is left behind."""

    def test_no_pictures(self, networks, recorded_checkpoint_of, tmp_path):
        out = tmp_path / "out.safetensors"
        with pytest.raises(UsageError, match="no picture is given"):
            make_lora(str(recorded_checkpoint_of("z-image")), [], out, **options(networks))
        words = [recorded_checkpoint_of("z-image"), "-o", out]
        invoke(main, "i2l", *words).assert_refused("no picture is given", 2)

    def test_no_picture(self, refused, networks, tmp_path):
        refused("picture 1", networks / "i2l/model.safetensors", code=2)
        refused("picture 1", tmp_path / "missing.png", code=2)

    def test_wrong_files(self, refused, networks, tmp_path):
        generator, siglip, dinov3 = (networks / name / "model.safetensors" for name in ("i2l", "siglip", "dinov3"))
        refused("is not SigLIP2: it has", siglip=dinov3)
        refused("is not DINOv3: it has", dinov3=generator)
        refused("is no generator of LoRAs", generator=siglip)
        refused("holds no safetensors file", generator=tmp_path)
        refused("there is no file", generator=tmp_path / "missing.safetensors")
        refused("is a pickle", generator="some/where/model.pt")
        (tmp_path / "files/broken.safetensors").write_bytes(b"none")
        refused("broken.safetensors", generator=tmp_path / "files/broken.safetensors")

    def test_of_another_model(self, refused, networks, recorded_checkpoint_of, tmp_path):
        refused("nothing makes LoRAs of pictures for qwen-image", model=recorded_checkpoint_of("qwen-image"))

        def wider(tensors):
            for key in [key for key in tensors if key.endswith("proj_a.proj_out.weight")]:
                tensors[key] = np.concatenate([tensors[key], tensors[key][:1]])

        refused("generator of another model", generator=changed(networks, "i2l", tmp_path, wider))

        def narrower(tensors):
            for key in [key for key in tensors if key.endswith("proj_in.weight")]:
                tensors[key] = np.ascontiguousarray(tensors[key][:, 1:])

        refused("takes 55 numbers of a picture", generator=changed(networks, "i2l", tmp_path, narrower))

        def shallow(tensors):
            del tensors["layers_lora.blocks.3.layers.2.proj_b.proj_out.weight"]

        refused("layers_lora.blocks.3", generator=changed(networks, "i2l", tmp_path, shallow))

    @pytest.mark.parametrize("name", ["siglip", "dinov3", "i2l"])
    def test_nan(self, refused, networks, tmp_path, name):
        def broken(tensors):
            next(value for key, value in sorted(tensors.items()) if value.ndim > 1)[0] = np.nan

        key = {"i2l": "generator"}.get(name, name)
        refused("NaN or Inf", **{key: changed(networks, name, tmp_path, broken)})

    def test_heads_unknown(self, refused, networks, tmp_path):
        folder = changed(networks, "dinov3", tmp_path, lambda tensors: None)
        (folder / "config.json").unlink()
        refused("nothing tells its attention heads", dinov3=folder)

    def test_out(self, refused, tmp_path):
        (tmp_path / "made").mkdir()
        (tmp_path / "made/there.safetensors").touch()
        refused("exists already", out="there.safetensors")
        refused("is no name of a LoRA", out="style.png", code=2)
        refused("is no folder", out="missing/out.safetensors")

    def test_memory(self, refused):
        refused("takes", memory="100kB")
