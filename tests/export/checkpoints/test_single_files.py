"""A weight file by itself stands for the components it holds; a base has the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from tests import handmade
from tests.export.checkpoints.test_layouts import original, same
from zimgkit.engines.bundle import CHECKPOINT
from zimgkit.engines.errors import CheckpointError, UsageError
from zimgkit.export.checkpoints.checkpoint import open_checkpoint, open_configs, open_origin, with_base
from zimgkit.export.checkpoints.single_files import components_in, guess_base
from zimgkit.export.cli.main import cli
from zimgkit.export.components import parts_of
from zimgkit.export.lora.inspect import is_lora


@pytest.fixture(scope="module")
def base(checkpoint_of):
    return checkpoint_of("z-image")


@pytest.fixture(scope="module")
def tensors(base):
    return {
        name: load_file(next((base / name).glob("*.safetensors"))) for name in ("transformer", "text_encoder", "vae")
    }


@pytest.fixture(scope="module")
def single(tensors, tmp_path_factory):
    """A transformer as ComfyUI has it, in a file of its own."""
    path = tmp_path_factory.mktemp("single") / "z_image_turbo_bf16.safetensors"
    changed = {name: tensor * 1.25 for name, tensor in original(tensors["transformer"]).items()}
    save_file(changed, path)
    return path


def test_a_file_over_a_base(base, tensors, single):
    opened = open_checkpoint(str(single), base=str(base))
    assert (opened.root, opened.files) == (base, {"transformer": single})
    same(opened.tensors("transformer"), {name: tensor * 1.25 for name, tensor in tensors["transformer"].items()})
    same(opened.tensors("vae"), tensors["vae"])
    parts_of(opened)
    assert opened.sources["transformer"].files == {single.name: single.stat().st_size}
    assert not any(name.startswith("transformer/") for name in opened.sources[CHECKPOINT].files)


def test_a_file_in_the_place_of_a_component(base, tensors, single, tmp_path):
    save_file({f"vae.{name}": tensor * 1.25 for name, tensor in tensors["vae"].items()}, tmp_path / "ae.safetensors")
    opened = open_checkpoint(str(base), files={"vae": tmp_path / "ae.safetensors", "transformer": single})
    same(opened.tensors("vae"), {name: tensor * 1.25 for name, tensor in tensors["vae"].items()})
    parts_of(opened)


def test_all_in_one(base, tensors, tmp_path):
    marks = {"transformer": "model.diffusion_model.", "text_encoder": "text_encoders.a.transformer.", "vae": "vae."}
    stored = {marks[name] + key: tensor for name, own in tensors.items() for key, tensor in own.items()}
    save_file(stored, tmp_path / "all.safetensors")
    opened = open_checkpoint(str(tmp_path / "all.safetensors"), base=str(base))
    assert set(opened.files) == set(tensors) and opened.source.files == {}
    parts_of(opened)


@pytest.mark.parametrize(
    "names, file, expected",
    [
        ("cap_embedder.1.weight", "z_image_turbo_bf16.safetensors", "Z-Image-Turbo"),
        ("cap_embedder.1.weight", "my-finetune.safetensors", "Z-Image"),
        ("model.diffusion_model.cap_embedder.1.weight siglip_embedder.1.weight", "a.safetensors", "Z-Image"),
        ("cap_embedder.1.weight siglip_embedder.1.weight", "z-image-turbo.safetensors", "Z-Image-Omni-Base"),
        (
            "transformer_blocks.0.txt_mod.1.weight",
            "Qwen-Image-Edit-2511_fp8.safetensors",
            "Qwen-Image-Edit-2511",
        ),
        ("transformer_blocks.0.txt_mod.1.weight", "qwen_image_2512.safetensors", "Qwen-Image-2512"),
        ("transformer_blocks.0.txt_mod.1.weight", "x.safetensors", "Qwen-Image"),
    ],
)
def test_the_base_is_guessed(names, file, expected):
    assert guess_base(Path(file), names.split()) == expected


def test_a_guess_is_said(single, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = CliRunner().invoke(cli, ["inspect", str(single)]).stderr
    assert "holds the transformer; the rest comes from Z-Image-Turbo (--base names another)" in said


def test_inspect_checks_as_a_build_does(base, single, tmp_path):
    done = CliRunner().invoke(cli, ["inspect", str(single), "--base", str(base)])
    assert done.exit_code == 0 and "denoiser" in done.stdout
    stored = load_file(single)
    del stored["layers.0.attention_norm1.weight"]
    save_file(stored, tmp_path / "a.safetensors")
    done = CliRunner().invoke(cli, ["inspect", str(tmp_path / "a.safetensors"), "--base", str(base)])
    assert "lacks the tensor 'layers.0.attention_norm1.weight'" in str(done.exception)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("double_blocks.0.img_attn.qkv.weight", "a FLUX transformer"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "a Stable Diffusion 3 transformer"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a Stable Diffusion U-Net"),
        ("blocks.0.cross_attn.k.weight", "a Wan transformer"),
        ("layers.0.attention.to_q.lora_A.weight", "a LoRA, which --lora takes"),
        ("lora_unet_layers_0.lora_down.weight", "a LoRA, which --lora takes"),
        ("encoder.block.0.layer.0.SelfAttention.k.weight", "a T5 text encoder"),
        ("anything", "of a model that zimgkit does not know"),
    ],
)
def test_others_are_named(tmp_path, name, kind):
    save_file({name: torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"a.safetensors is {kind}"):
        components_in(tmp_path / "a.safetensors")


def test_what_does_not_fit(base, single, tmp_path):
    with pytest.raises(CheckpointError, match="holds a transformer, and no vae"):
        with_base(str(base), None, {"vae": single})
    with pytest.raises(UsageError, match="--base is of a weight file"):
        with_base(str(base), "Z-Image", {})
    save_file({"layers.0.self_attn.q_proj.weight": torch.ones(1)}, tmp_path / "qwen_3_4b.safetensors")
    with pytest.raises(CheckpointError, match="holds no transformer; give a part alone with --text-encoder"):
        with_base(str(tmp_path / "qwen_3_4b.safetensors"), None, {})
    with pytest.raises(CheckpointError, match="does not exist"):
        with_base(str(base), None, {"vae": tmp_path / "none.safetensors"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 3}, r"it has 2 of 'layers', and 3 are there"),
        ({"n_layers": 1}, r"it has 2 of 'layers', and 1 are there"),
        ({"cap_feat_dim": 64}, r"has shape \(48, 32\), and \(48, 64\) there"),
    ],
)
@pytest.mark.parametrize("opens", [open_checkpoint, open_configs])
def test_a_file_of_another_size_than_its_base(base, single, tmp_path, change, message, opens):
    """Told from the configs alone: no weights of the base are there."""
    other = shutil.copytree(base, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    config = other / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(CheckpointError, match=f"{single} is no transformer of the size of {other}'s: .*{message}"):
        opens(str(single), base=str(other))


def test_a_file_of_a_transformer_is_no_lora(single, tmp_path):
    assert not is_lora(str(single))
    save_file({"cap_embedder.1.lora_A.weight": torch.ones(1, 1)}, tmp_path / "lora.safetensors")
    assert is_lora(str(tmp_path / "lora.safetensors"))


def test_a_bundle_knows_its_files(base, single):
    """Its checkpoint is found again, with the file, or by the file alone."""
    opened = open_checkpoint(str(single), base=str(base))
    manifest = handmade.manifest("z-image", sources=opened.sources)
    for again in (open_origin(manifest), open_origin(manifest, str(single)), open_origin(manifest, str(base))):
        assert again.sources == opened.sources
