"""Every format that diffusers reads, merged as its ``load_lora_weights`` and ``fuse_lora`` merge it."""

from __future__ import annotations

import copy

import pytest
import torch

from tests import reference
from tests.export.lora import lora_files
from tests.export.lora.lora_files import FORMATS, TARGETS, assert_near, merged_by, write

pytest.importorskip("peft", reason="diffusers needs peft for LoRAs")


@pytest.fixture(scope="module", params=["z-image", "qwen-image"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(family):
    return reference.FAMILIES[family]()


def fused(pipeline, path, scale=1.0):
    """The tensors that diffusers changes."""
    before = pipeline.transformer
    pipeline.transformer = copy.deepcopy(before)
    try:
        pipeline.load_lora_weights(str(path))
        pipeline.fuse_lora(components=["transformer"], lora_scale=scale)
        pipeline.unload_lora_weights()
        after = pipeline.transformer.state_dict()
    finally:
        pipeline.transformer = before
    return {name: after[name] for name, value in before.state_dict().items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("scale", [1.0, -0.6])
@pytest.mark.parametrize("name", FORMATS)
def test_format(family, pipeline, checkpoint_of, tmp_path, name, scale):
    weights = lora_files.modules(pipeline.transformer.state_dict(), TARGETS[family])
    path = write(tmp_path / "lora.safetensors", FORMATS[name](lora_files.pairs(weights)))
    expected = fused(pipeline, path, scale)
    assert len(expected) == len(weights)
    assert_near(merged_by(checkpoint_of(family), f"{path}:{scale}"), expected)


def test_alpha_in_the_metadata(family, pipeline, checkpoint_of, tmp_path):
    weights = lora_files.modules(pipeline.transformer.state_dict(), ("to_q", "to_k"))
    state = FORMATS["diffusers"](lora_files.pairs(weights))
    config = {"r": 4, "lora_alpha": 3, "target_modules": ["to_q", "to_k"], "alpha_pattern": {"to_k": 6}}
    config = {f"transformer.{key}": value for key, value in config.items()}
    path = write(tmp_path / "lora.safetensors", state, lora_adapter_metadata=config, format="pt")
    assert_near(merged_by(checkpoint_of(family), path), fused(pipeline, path))


def test_dora(family, pipeline, checkpoint_of, tmp_path):
    weights = lora_files.modules(pipeline.transformer.state_dict(), ("to_q", "to_out.0"))
    state = FORMATS["diffusers"](lora_files.pairs(weights))
    generator = torch.Generator().manual_seed(7)
    for name, value in weights.items():
        key = f"transformer.{name}.lora_magnitude_vector"
        state[key] = torch.rand(value.shape[0], generator=generator) + 0.5
    path = write(tmp_path / "lora.safetensors", state)
    assert_near(merged_by(checkpoint_of(family), path), fused(pipeline, path))


@pytest.fixture(scope="module")
def z_image():
    return reference.FAMILIES["z-image"]()


def test_kohya_with_q_k_v_as_one(z_image, checkpoint_of, tmp_path):
    weights = lora_files.modules(z_image.transformer.state_dict(), ("to_q", "to_out.0"))
    one = {
        name.replace("to_q", "qkv").replace("to_out.0", "out"): value if "out" in name else torch.cat([value] * 3)
        for name, value in weights.items()
    }
    path = write(tmp_path / "lora.safetensors", lora_files.kohya(lora_files.pairs(one)))
    expected = fused(z_image, path)
    assert len(expected) == 2 * len(weights)
    assert_near(merged_by(checkpoint_of("z-image"), path), expected)


def test_dots_and_what_is_there_twice(z_image, checkpoint_of, tmp_path):
    weights = lora_files.modules(z_image.transformer.state_dict(), ("to_q", "to_k", "to_v", "to_out.0", "w1"))
    path = write(tmp_path / "lora.safetensors", lora_files.dots(lora_files.pairs(weights)))
    assert_near(merged_by(checkpoint_of("z-image"), path), fused(z_image, path))


def test_dots_whose_alphas_have_underscores(z_image, checkpoint_of, tmp_path):
    """https://github.com/huggingface/diffusers/issues/13203: ``to_q.alpha`` beside ``to.q.lora.down.weight``."""
    weights = lora_files.modules(z_image.transformer.state_dict(), ("to_q", "to_k", "to_v", "to_out.0", "w1"))
    stored = lora_files.dots(lora_files.pairs(weights))
    stored |= {f"diffusion_model.{n}.alpha": torch.tensor(lora_files.alpha_of(i)) for i, n in enumerate(weights)}
    path = write(tmp_path / "lora.safetensors", stored)
    expected = fused(z_image, path)
    assert len(expected) == len(weights)
    assert_near(merged_by(checkpoint_of("z-image"), path), expected)


@pytest.mark.parametrize("low_rank", ["neither", "second"])
def test_lokr(z_image, checkpoint_of, tmp_path, low_rank):
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, value in lora_files.modules(z_image.transformer.state_dict(), ("to_q", "w2")).items():
        sides = {"w1": (4, 4), "w2": (value.shape[0] // 4, value.shape[1] // 4)}
        for part, (rows, columns) in sides.items():
            key = f"diffusion_model.{name}.lokr_{part}"
            if low_rank == "second" and part == "w2":
                state[f"{key}_a"] = 0.3 * torch.randn(rows, 3, generator=generator)
                state[f"{key}_b"] = 0.3 * torch.randn(3, columns, generator=generator)
            else:
                state[key] = 0.3 * torch.randn(rows, columns, generator=generator)
        state[f"diffusion_model.{name}.alpha"] = torch.tensor(2.0)
    path = write(tmp_path / "lora.safetensors", state)
    expected = fused(z_image, path)
    assert expected
    assert_near(merged_by(checkpoint_of("z-image"), path), expected)
