"""Demo checkpoints: what diffusers loads whole, what zimgkit builds, and the same picture from both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline, ZImagePipeline
from safetensors.torch import load_file

from tests.commands import invoke
from zimgkit.export.build import build
from zimgkit.export.cli.main import main
from zimgkit.runtime import Pipeline

CLASSES = {"z-image": ZImagePipeline, "qwen-image": QwenImagePipeline}


@pytest.mark.parametrize("family", CLASSES)
def test_diffusers_and_zimg_draw_the_same_from_it(family, tmp_path):
    folder = tmp_path / "checkpoint"
    result = invoke(main, "demo-checkpoint", folder, "--family", family)
    assert (result.code, result.out) == (0, f"{folder}\n")
    reference = CLASSES[family].from_pretrained(folder, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    for name in ("transformer", "text_encoder", "vae"):
        (file,) = (folder / name).glob("*.safetensors")
        stored = sum(value.numel() for value in load_file(file).values())
        module = getattr(reference, name)
        assert stored == sum(parameter.numel() for parameter in module.parameters())
        assert not any(parameter.is_meta for parameter in module.parameters())
    build(str(folder), tmp_path / "bundle", precision="fp32")
    size = {"height": 64, "width": 96, "num_inference_steps": 2}
    scale = {"guidance_scale": 0.0} if family == "z-image" else {"true_cfg_scale": 1.0}
    generator = torch.Generator("cpu").manual_seed(0)
    expected = reference("a cat", generator=generator, output_type="np", **size, **scale).images
    with Pipeline.open(tmp_path / "bundle") as pipeline:
        found = pipeline("a cat", seed=0, output_type="np", **size, **scale).images
    assert expected.std() > 0.05
    assert np.abs(found - expected).max() < 1e-3


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert invoke(main, "demo-checkpoint", tmp_path / name, "--family", "z-image", "--seed", seed).code == 0
    a, b, c = ((tmp_path / n / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_wrong_calls(tmp_path):
    invoke(main, "demo-checkpoint", tmp_path / "x", "--family", "flux").assert_refused("'flux' is not one of", 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    for extra in ((), ("--overwrite",)):
        result = invoke(main, "demo-checkpoint", tmp_path / "mine", "--family", "z-image", *extra)
        result.assert_refused("exists and has no model_index.json", 1)
