"""From a checkpoint to a bundle: what is in it, and that nothing is left where something is wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from tests.commands import heed_interrupts, invoke
from zimgkit.engines.bundle import CPU_GRAPH, MANIFEST, Bundle, Layers
from zimgkit.export import build as builds
from zimgkit.export import writing
from zimgkit.export.cli.main import main


@pytest.fixture(scope="module", params=["z-image", "qwen-image"])
def family(request):
    return request.param


@pytest.fixture
def checkpoint(family, checkpoint_of, tmp_path):
    """A copy to break."""
    return shutil.copytree(checkpoint_of(family), tmp_path / "checkpoint")


def export(model, out, *arguments):
    return invoke(main, "build", "--model", model, "--out", out, "--precision", "fp32", "--quiet", *arguments)


def assert_refused(checkpoint, tmp_path, message, code=1):
    """One line, the right exit code, and nothing beside what was there."""
    before = sorted(tmp_path.iterdir())
    export(checkpoint, tmp_path / "bundle").assert_refused(message, code)
    assert sorted(tmp_path.iterdir()) == before


def weights(checkpoint, component):
    (file,) = (checkpoint / component).glob("*.safetensors")
    return file


def change_config(checkpoint, component, **changes):
    path = checkpoint / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_bundle(family, bundle_of, checkpoint_of):
    bundle = Bundle.open(bundle_of(family))
    manifest = bundle.manifest
    assert manifest.family == family
    assert manifest.precision == "float32"
    expected = {"text_encoder", "conditioner", "denoiser", "vae_decoder"}
    assert set(manifest.components) == expected | ({"modulation"} if family == "qwen-image" else set())
    assert {p.relative_to(bundle.root).as_posix() for p in bundle.root.rglob("*") if p.is_file()} == {
        MANIFEST, *manifest.files,
    }  # fmt: skip
    source = load_file(weights(checkpoint_of(family), "transformer"))
    total = sum(manifest.components[name].parameters for name in expected - {"text_encoder", "vae_decoder"})
    total += manifest.components["modulation"].parameters if family == "qwen-image" else 0
    assert total == sum(value.numel() for value in source.values())
    # A float32 checkpoint needs no change: the transformer's file is the checkpoint's own.
    (file,) = manifest.components["denoiser"].weights
    assert bundle.file(file).samefile(weights(checkpoint_of(family), "transformer"))


def test_bfloat16_is_half_the_size_and_has_a_graph_for_cpus(family, bundle_of):
    wide, narrow = (Bundle.open(bundle_of(family, precision)).manifest for precision in ("fp32", "bf16"))
    for name, component in narrow.components.items():
        assert 2 * component.weight_bytes == wide.components[name].weight_bytes
        assert list(component.graphs) == ([] if name == "modulation" else ["bfloat16", "float32", CPU_GRAPH])


def test_verify(family, bundle_of, checkpoint_of):
    for precision in ("fp32", "bf16"):
        result = invoke(
            main, "verify", bundle_of(family, precision), "--model", checkpoint_of(family), "--json", "--quiet"
        )
        report = json.loads(result.out)
        assert (result.code, report["passed"]) == (0, True)
        for name, entry in report["components"].items():
            assert entry["different"] == 0
            assert name == "modulation" or entry["relative_max_error"] < (2e-5 if precision == "fp32" else 5e-2)


def test_verify_finds_weights_of_another_checkpoint(family, bundle_of, checkpoint_of):
    other = checkpoint_of(family, 1)
    result = invoke(main, "verify", bundle_of(family), "--model", other, "--quiet")
    assert result.code == 1
    assert "FAILED" in result.out
    assert "is not what the checkpoint makes; build it again" in result.err


def test_verify_names_another_family(bundle_of, checkpoint_of):
    result = invoke(main, "verify", bundle_of("z-image"), "--model", checkpoint_of("qwen-image"), "--quiet")
    result.assert_refused("of family z-image", 1)


def test_inspect(family, checkpoint_of):
    result = invoke(main, "inspect", checkpoint_of(family), "--json")
    report = json.loads(result.out)
    assert report["family"] == family
    assert report["components"]["denoiser"]["parameters"] > 100_000
    assert invoke(main, "inspect", checkpoint_of(family)).code == 0


def test_build_prints_what_it_built(family, checkpoint_of, tmp_path):
    out = tmp_path / "folder" / "bundle"
    result = export(checkpoint_of(family), out, "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["path"] == str(out)
    export(checkpoint_of(family), out).assert_refused("exists already; name another folder, or replace it", 1)
    before = (out / MANIFEST).stat().st_mtime_ns
    assert export(checkpoint_of(family), out, "--overwrite").code == 0
    assert (out / MANIFEST).stat().st_mtime_ns != before
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_a_folder_that_is_no_bundle_is_not_overwritten(family, checkpoint_of, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("all of it")
    result = export(checkpoint_of(family), tmp_path / "precious", "--overwrite")
    result.assert_refused("exists and has no bundle.json", 1)
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "all of it"


def test_missing_shard(checkpoint, tmp_path):
    folder = checkpoint / "transformer"
    tensors = load_file(weights(checkpoint, "transformer"))
    weights(checkpoint, "transformer").unlink()
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:9]}, folder / shards[0])
    index = {name: shards[position >= 9] for position, name in enumerate(names)}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_refused(checkpoint, tmp_path, shards[1])
    save_file({name: tensors[name] for name in names[9:]}, folder / shards[1])
    assert export(checkpoint, tmp_path / "bundle").code == 0


def test_truncated_shard(checkpoint, tmp_path):
    file = weights(checkpoint, "vae")
    os.truncate(file, file.stat().st_size - 100)
    assert_refused(checkpoint, tmp_path, "is cut short")


def test_wrong_shape(checkpoint, tmp_path):
    file = weights(checkpoint, "text_encoder")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.0.mlp.down_proj.weight"))
    save_file(tensors | {name: tensors[name].T.contiguous()}, file)
    assert_refused(checkpoint, tmp_path, "has shape (48, 32) instead of (32, 48)")


def test_missing_tensor(checkpoint, tmp_path):
    file = weights(checkpoint, "transformer")
    tensors = load_file(file)
    removed = next(name for name in tensors if ".1." in name)
    del tensors[removed]
    save_file(tensors, file)
    assert_refused(checkpoint, tmp_path, f"the transformer lacks the tensor {removed!r}")


def test_unexpected_tensor(checkpoint, tmp_path):
    file = weights(checkpoint, "transformer")
    tensors = load_file(file)
    save_file(tensors | {"control.weight": next(iter(tensors.values())).clone()}, file)
    assert_refused(checkpoint, tmp_path, "has no use for 'control.weight'")


def test_a_checkpoint_that_takes_pictures_apart(checkpoint_of, tmp_path):
    """Its class says so; it is quantized as others are, without the networks of other tasks."""
    made = builds.build(str(checkpoint_of("qwen-image-layered")), tmp_path / "b", precision="int8-weights")
    manifest = made.manifest
    assert (manifest.tasks, manifest.layers) == (("layers",), Layers(640, 4))
    assert {"denoiser.conditions", "vae_encoder"} <= manifest.components.keys()
    assert not {"vision_encoder", "text_encoder.pictures"} & manifest.components.keys()
    assert manifest.components["vae_decoder"].outputs["image"].shape[1] == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8-weights"])
def test_a_weight_that_is_no_number(checkpoint, tmp_path, precision):
    """In a file that is linked, one that is cast, and one that is quantized."""
    file = weights(checkpoint, "transformer")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(("s.1.attention.to_q.weight", "s.1.attn.to_q.weight")))
    tensors[name][3, 5:8] = float("nan")
    tensors[name][0, 0] = float("inf")
    save_file(tensors, file)
    before = sorted(tmp_path.iterdir())
    result = invoke(main, "build", "--model", checkpoint, "--out", tmp_path / "b", "--precision", precision, "--quiet")
    result.assert_refused(f"{file}: {name!r} has 4 values that are NaN or infinite", 1)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("component, unused", [("text_encoder", r"(model\.)?norm\..*"), ("vae", r"encoder\..*")])
def test_what_no_picture_needs_may_be_no_number(checkpoint_of, tmp_path, component, unused):
    checkpoint = shutil.copytree(checkpoint_of("z-image"), tmp_path / "checkpoint")
    file = weights(checkpoint, component)
    tensors = load_file(file)
    broken = {name: value * float("nan") for name, value in tensors.items() if re.fullmatch(unused, name)}
    assert broken
    save_file(tensors | broken, file)
    assert export(checkpoint, tmp_path / "bundle").code == 0


def test_a_config_of_another_size(checkpoint, family, tmp_path):
    change_config(checkpoint, "transformer", **({"n_layers": 3} if family == "z-image" else {"num_layers": 3}))
    assert_refused(checkpoint, tmp_path, "the transformer lacks the tensor")


def test_a_pickle(checkpoint, tmp_path):
    file = weights(checkpoint, "vae")
    file.rename(file.with_suffix(".bin"))
    assert_refused(checkpoint, tmp_path, "pickle")


def test_a_pickle_by_another_name(checkpoint, tmp_path):
    weights(checkpoint, "vae").write_bytes(b"\x80\x04\x95" + b"x" * 1000)
    assert_refused(checkpoint, tmp_path, "pickle")


def test_another_family(checkpoint, tmp_path):
    index = checkpoint / "model_index.json"
    index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert_refused(checkpoint, tmp_path, "FluxPipeline")


def test_a_config_zimg_does_not_implement(checkpoint, family, tmp_path):
    key = {"siglip_feat_dim": 1152} if family == "z-image" else {"guidance_embeds": True}
    change_config(checkpoint, "transformer", **key)
    assert_refused(checkpoint, tmp_path, f"has {next(iter(key))}")


def test_a_scheduler_zimg_does_not_implement(checkpoint, tmp_path):
    path = checkpoint / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_karras_sigmas": True}))
    assert_refused(checkpoint, tmp_path, "use_karras_sigmas is set")


def test_a_broken_tokenizer(checkpoint, tmp_path):
    (checkpoint / "tokenizer" / "tokenizer.json").write_text("{}")
    assert_refused(checkpoint, tmp_path, "holds no tokenizer zimgkit can read")


def test_unknown_models(tmp_path):
    for model, message in (
        ("Z-Image-Turbp", "Z-Image-Turbo"),
        ("./nowhere", "does not exist"),
        ("Z-Image-Edit", "does not serve"),
        ("Z-Image-i2L", "makes LoRAs of pictures"),
    ):
        export(model, tmp_path / "bundle").assert_refused(message, 1)
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage(tmp_path):
    invoke(main, "build", "--out", tmp_path / "b").assert_refused("Missing option '--model'", 2)
    export("Qwen-Image", tmp_path / "b", "--precision", "fp7").assert_refused("'fp7' is not one of", 2)


def test_a_disk_too_small_is_found_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(builds.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    before = sorted(tmp_path.iterdir())
    result = invoke(
        main, "build", "--model", checkpoint, "--out", tmp_path / "bundle", "--precision", "bf16", "--quiet"
    )
    result.assert_refused("GB free, and the bundle needs", 1)
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_fills_up_half_way(checkpoint, tmp_path, monkeypatch):
    def fill(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.ir, "save", fill)
    assert_refused(checkpoint, tmp_path, "No space left on device); free some space")


def test_an_old_bundle_survives_a_failed_build(checkpoint, family, bundle_of, tmp_path, monkeypatch):
    old = shutil.copytree(bundle_of(family), tmp_path / "bundle")
    weights(checkpoint, "vae").unlink()
    assert export(checkpoint, old, "--overwrite").code == 1
    Bundle.open(old).verify(afresh=True)


def start(checkpoint, out, *arguments):
    """A build in a process of its own, which has begun to write."""
    code = "from zimgkit.export.cli.main import main; main()"
    command = [sys.executable, "-c", code, "build", "--model", checkpoint, "--out", out, "--quiet", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    deadline = time.monotonic() + 120
    while not list(out.parent.glob(f".{out.name}.*.part")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_half_way(checkpoint_of, tmp_path, number):
    process = start(checkpoint_of("z-image"), tmp_path / "bundle")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert err.splitlines()[-1] == "zimg-export: error: interrupted; nothing half-written is left"
    assert list(tmp_path.iterdir()) == []


def test_two_builds_into_one_folder(checkpoint_of, tmp_path):
    out = tmp_path / "bundle"
    first = start(checkpoint_of("z-image"), out)
    try:
        export(checkpoint_of("z-image"), out).assert_refused("another process is writing", 1)
    finally:
        first.kill()
        first.communicate()
    # What the killed build left is cleared by the next one, which then succeeds.
    assert list(tmp_path.glob(".bundle.*.part"))
    assert export(checkpoint_of("z-image"), out).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_what_a_kill_put_aside_comes_back(family, checkpoint, bundle_of, tmp_path):
    shutil.copytree(bundle_of(family), tmp_path / ".bundle.0123abcd.old")
    weights(checkpoint, "vae").unlink()
    assert export(checkpoint, tmp_path / "bundle", "--overwrite").code == 1
    Bundle.open(tmp_path / "bundle").verify(afresh=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]


def test_manifest_round_trip(family, bundle_of):
    bundle = Bundle.open(bundle_of(family))
    text = (bundle.root / MANIFEST).read_bytes()
    assert msgspec.json.decode(text) == msgspec.json.decode(msgspec.json.encode(bundle.manifest))
    assert Path(bundle.manifest.checkpoint.model).name.startswith("checkpoint")
