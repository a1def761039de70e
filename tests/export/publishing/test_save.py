"""A bundle as a checkpoint for others: read back by diffusers, and by a build of our own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file

from tests import reference
from tests.commands import invoke
from zimgkit.engines.bundle import Bundle, Source, write_manifest
from zimgkit.engines.errors import CheckpointError, OutputError
from zimgkit.engines.tensors.safetensors import view
from zimgkit.export.build import build
from zimgkit.export.cli.main import main
from zimgkit.export.publishing.save import save
from zimgkit.runtime import demo_models

CALL = {"height": 32, "width": 48, "num_inference_steps": 2}
COMPONENTS = ("transformer", "text_encoder", "vae")


def orphan(bundle: Path, target: Path) -> Path:
    """A copy of a bundle whose checkpoint is nowhere."""
    shutil.copytree(bundle, target, copy_function=os.link)
    manifest = Bundle.open(target, verify=False).manifest
    sources = {"checkpoint": Source("/nowhere/gone", None, manifest.checkpoint.files)}
    write_manifest(target, msgspec.structs.replace(manifest, sources=sources))
    return target


def stored(checkpoint: Path, component: str) -> dict[str, torch.Tensor]:
    (file,) = (checkpoint / component).glob("*.safetensors")
    return load_file(file)


def loaded(folder: Path, dtype: torch.dtype = torch.float32):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same(draws) -> None:
    """The last bits differ with where a file's tensors lie in memory."""
    np.testing.assert_allclose(*draws, rtol=0, atol=5e-6)


def weights(bundle: Path) -> dict[tuple[str, str], bytes]:
    """Every tensor that the components of a bundle take, by component and name."""
    opened = Bundle.open(bundle)
    return {
        (name, tensor.removeprefix("model.").removeprefix("vision_model.")): view(info).tobytes()
        for name, component in opened.manifest.components.items()
        if not component.variant_of
        for tensor, info in opened.tensors(name).items()
    }


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
class TestDiffusers:
    def test_the_checkpoint_comes_back(self, family, bundle_of, checkpoint_of, tmp_path):
        saved = save(bundle_of(family), tmp_path / "out", "diffusers")
        assert saved.notes == ()
        for component in COMPONENTS:
            found, expected = stored(tmp_path / "out", component), stored(checkpoint_of(family), component)
            names = {
                name.replace("model.language_model.", "model.").replace("model.visual.", "visual.") for name in expected
            }
            assert {name.removeprefix("model.") for name in found} == {name.removeprefix("model.") for name in names}
            if component != "text_encoder":
                assert all(torch.equal(found[name], value) for name, value in expected.items())
        draws = [
            reference.draw(loaded(folder), "a cat", **CALL) for folder in (tmp_path / "out", checkpoint_of(family))
        ]
        assert_same(draws)

    def test_without_the_checkpoint_pictures_are_the_same(self, family, bundle_of, checkpoint_of, tmp_path):
        saved = save(orphan(bundle_of(family), tmp_path / "orphan"), tmp_path / "out", "diffusers")
        assert all(note.startswith("vae: ") for note in saved.notes)
        assert bool(saved.notes) == (family == "qwen-image")
        draws = [
            reference.draw(loaded(folder), "a cat", **CALL) for folder in (tmp_path / "out", checkpoint_of(family))
        ]
        assert_same(draws)

    def test_what_is_not_linked_and_no_picture_needs_is_zeros(self, family, bundle_of, checkpoint_of, tmp_path):
        bundle = orphan(bundle_of(family, "bf16"), tmp_path / "orphan")
        saved = save(bundle, tmp_path / "out", "diffusers")
        assert any("tensors are zeros (of" in note for note in saved.notes)
        rounded = loaded(checkpoint_of(family), torch.bfloat16).to(torch.float32)
        draws = [reference.draw(pipeline, "a cat", **CALL) for pipeline in (loaded(tmp_path / "out"), rounded)]
        assert_same(draws)
        encoder = {
            name: value for name, value in stored(tmp_path / "out", "vae").items() if name.startswith("encoder.")
        }
        assert encoder
        assert not any(value.any() for value in encoder.values())

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_a_build_takes_it_again(self, family, precision, bundle_of, tmp_path):
        bundle = orphan(bundle_of(family, precision), tmp_path / "orphan")
        save(bundle, tmp_path / "out", "diffusers")
        build(str(tmp_path / "out"), tmp_path / "again", precision=precision)
        found, expected = weights(tmp_path / "again"), weights(bundle)
        own = Bundle.open(bundle).manifest.components
        assert found.keys() >= {key for key in expected if not _is_linked(own[key[0]].weights)}
        assert {key: found[key] for key in expected.keys() & found.keys()} == {
            key: expected[key] for key in expected.keys() & found.keys()
        }

    @pytest.mark.parametrize("precision", ["int8-weights", "int4-weights", "fp8", "int8"])
    def test_quantized_weights_are_multiplied_out(self, family, precision, quantized_of, checkpoint_of, tmp_path):
        bundle = orphan(quantized_of(family, precision), tmp_path / "orphan")
        saved = save(bundle, tmp_path / "out", "diffusers")
        assert any(f"of {precision} were multiplied out to bfloat16" in note for note in saved.notes)
        opened = Bundle.open(bundle)
        scaled = [name for name in opened.tensors("denoiser") if name + ".scale" in opened.tensors("denoiser")]
        found, expected = stored(tmp_path / "out", "transformer"), stored(checkpoint_of(family), "transformer")
        bound = {"int8-weights": 0.01, "int8": 0.02, "fp8": 0.04, "int4-weights": 0.15}[precision]
        assert len(scaled) > 10
        for name in scaled:
            assert found[name].dtype == torch.bfloat16
            error = (found[name].float() - expected[name]).norm() / expected[name].norm()
            assert 1e-4 < error < bound, name
        loaded(tmp_path / "out")


def _is_linked(weights: tuple[str, ...]) -> bool:
    return any("/" in name for name in weights)


@pytest.mark.parametrize("family", ["z-image-omni"])
def test_checkpoints_that_take_pictures(family, bundle_of, tmp_path):
    bundle = orphan(bundle_of(family), tmp_path / "orphan")
    save(bundle, tmp_path / "out", "diffusers")
    build(str(tmp_path / "out"), tmp_path / "again", precision="fp32")
    found, expected = weights(tmp_path / "again"), weights(bundle)
    assert found.keys() & expected.keys() >= {key for key in expected if "visual" not in key[1]}
    assert all(found[key] == expected[key] for key in found.keys() & expected.keys())
    assert Bundle.open(tmp_path / "again").manifest.references == Bundle.open(bundle).manifest.references
    assert Bundle.open(tmp_path / "again").manifest.layers == Bundle.open(bundle).manifest.layers


def test_a_merged_lora_is_in_it(tmp_path):
    lora = demo_models.locate_lora("zimg-tiny-z-outlined")
    bundle = build("zimg-tiny-z", tmp_path / "bundle", loras=[str(lora)], precision="fp32")
    save(bundle.root, tmp_path / "out", "diffusers")
    (file,) = (name for name in bundle.component("denoiser").weights if ".lora." in name)
    merged, found = (
        load_numpy(bundle.file(file)),
        load_numpy(next((tmp_path / "out" / "transformer").glob("*.safetensors"))),
    )
    assert len(merged) > 10
    for name, value in merged.items():
        np.testing.assert_array_equal(found[name], value)


def test_another_checkpoint_is_refused(bundle_of, checkpoint_of, tmp_path):
    with pytest.raises(CheckpointError, match=r"is not the checkpoint that .* was built from"):
        save(bundle_of("z-image"), tmp_path / "out", "diffusers", model=str(checkpoint_of("qwen-image")))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_found_before_anything_is_written(bundle_of, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 999, 1))
    with pytest.raises(OutputError, match="GB free, and the checkpoint needs"):
        save(bundle_of("z-image"), tmp_path / "out", "diffusers")
    assert not list(tmp_path.iterdir())


def test_the_command(bundle_of, tmp_path):
    out = tmp_path / "out"
    done = invoke(main, "export", bundle_of("z-image"), "--out", out)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{out}  0.0")
    invoke(main, "export", bundle_of("z-image"), "--out", out).assert_refused("exists already", 1)
    assert invoke(main, "export", bundle_of("z-image"), "--out", out, "--overwrite", "--json").code == 0
    invoke(main, "export", tmp_path / "none", "--out", out).assert_refused("is not a bundle", 1)
    invoke(main, "export", bundle_of("z-image"), "--out", out, "--format", "onnx").assert_refused("'onnx'", 2)
