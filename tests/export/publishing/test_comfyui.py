"""A bundle as ComfyUI's files: the names that its loaders look for, read back by diffusers' own conversion of them."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import reference
from tests.commands import invoke
from zimgkit.engines.errors import UsageError
from zimgkit.engines.tensors.safetensors import read_header
from zimgkit.export.checkpoints.checkpoint import open_checkpoint, read_component
from zimgkit.export.checkpoints.stored import row_count, tensor_rows
from zimgkit.export.cli.main import main
from zimgkit.export.publishing.comfyui import of_all
from zimgkit.export.publishing.save import save

CALL = {"height": 32, "width": 48, "num_inference_steps": 2}
SIGNS = {
    "z-image": {
        "diffusion_models": ("cap_embedder.1.weight", "layers.0.attention.qkv.weight", "x_embedder.weight"),
        "text_encoders": ("model.embed_tokens.weight", "model.layers.0.self_attn.k_norm.weight"),
        "vae": (
            "decoder.mid.block_1.norm1.weight",
            "decoder.up.3.block.0.conv1.weight",
            "encoder.down.0.downsample.conv.bias",
        ),
    },
    "qwen-image": {
        "diffusion_models": ("transformer_blocks.0.attn.to_q.weight", "txt_norm.weight"),
        "text_encoders": ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"),
        "vae": ("decoder.middle.0.residual.0.gamma", "decoder.upsamples.3.resample.1.weight", "conv2.weight"),
    },
}
"""Family -> folder -> tensors by which ComfyUI tells what a file is."""


def loaded(checkpoint: Path):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_files_for_each_loader(family, bundle_of, tmp_path):
    out = tmp_path / "models"
    saved = save(bundle_of(family), out, "comfyui")
    assert sorted(saved.files) == sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))
    for folder, names in SIGNS[family].items():
        (file,) = (out / folder).iterdir()
        found = read_header(file)
        assert found.keys() >= set(names)
        assert not any("mid_block" in name or "lm_head" in name for name in found)


def test_diffusers_reads_them(bundle_of, checkpoint_of, tmp_path):
    checkpoint = checkpoint_of("z-image")
    save(bundle_of("z-image"), tmp_path / "models", "comfyui")
    pipeline = loaded(checkpoint)
    expected = reference.draw(pipeline, "a cat", **CALL)
    kinds = {
        "transformer": ("diffusion_models", diffusers.ZImageTransformer2DModel),
        "vae": ("vae", diffusers.AutoencoderKL),
    }
    for component, (folder, kind) in kinds.items():
        (file,) = (tmp_path / "models" / folder).iterdir()
        config = str(checkpoint)
        own = kind.from_single_file(str(file), config=config, subfolder=component, torch_dtype=torch.float32)
        setattr(pipeline, component, own)
    np.testing.assert_allclose(reference.draw(pipeline, "a cat", **CALL), expected, rtol=0, atol=5e-6)


def test_wan_names_are_those_of_diffusers_conversion(bundle_of, checkpoint_of, tmp_path):
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    save(bundle_of("qwen-image"), tmp_path / "models", "comfyui")
    (file,) = (tmp_path / "models" / "vae").iterdir()
    # It has numbers of its own for the one shortcut that the real network has in its decoder.
    found = {name: value for name, value in load_file(file).items() if ".shortcut." not in name}
    found = convert_wan_vae_to_diffusers(found)
    (own,) = (checkpoint_of("qwen-image") / "vae").glob("*.safetensors")
    expected = {name: value for name, value in load_file(own).items() if "conv_shortcut" not in name}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_one_file_of_all(bundle_of, tmp_path):
    out = tmp_path / "z.safetensors"
    done = invoke(main, "export", bundle_of("z-image"), "--format", "comfyui", "--out", out)
    assert done.code == 0
    marks = {".".join(name.split(".")[:3]) for name in read_header(out) if name.startswith("text_encoders")}
    assert marks == {"text_encoders.qwen3_4b.transformer"}
    found = read_header(out)
    assert {"model.diffusion_model.layers.0.attention.qkv.weight", "vae.decoder.mid.block_1.norm1.weight"} <= set(found)
    again = ["export", bundle_of("z-image"), "--format", "comfyui", "--out", out]
    invoke(main, *again).assert_refused("exists already", 1)
    assert invoke(main, *again, "--overwrite").code == 0
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
@pytest.mark.parametrize("out", ["models", "all.safetensors"])
def test_they_are_read_again(family, out, bundle_of, checkpoint_of, tmp_path):
    """By the table of names that is read from, which knows nothing of the one that is written by."""
    save(bundle_of(family), tmp_path / out, "comfyui")
    checkpoint = open_checkpoint(str(checkpoint_of(family)))
    for component, folder in {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}.items():
        files = [tmp_path / out] if (tmp_path / out).is_file() else [*(tmp_path / out / folder).iterdir()]
        found, expected = read_component(files, component), checkpoint.tensors(component)
        assert found.keys() == expected.keys() - {"lm_head.weight"}
        for name, tensor in found.items():
            rows = row_count(tensor.shape)
            assert tensor.shape == expected[name].shape
            np.testing.assert_array_equal(tensor_rows(tensor, 0, rows), tensor_rows(expected[name], 0, rows), name)


def test_what_no_single_file_holds():
    with pytest.raises(UsageError, match="no single file for ComfyUI holds a siglip"):
        of_all({"siglip": {}}, {"model_type": "qwen3"})
