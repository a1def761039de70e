from __future__ import annotations

import json
import math

import pytest
import sparse_checkpoint
from safetensors import safe_open

# Counted on the released checkpoints: parameters of the transformer, of the text encoder and of the VAE.
PARAMETERS = {
    "z-image": (6_154_908_736, 4_022_468_096, 83_819_683),
    "qwen-image": (20_430_401_088, 8_292_166_656, 126_892_531),
}
TENSORS = {"z-image": (521, 398, 244), "qwen-image": (1933, 729, 194)}
COMPONENTS = ("transformer", "text_encoder", "vae")


@pytest.fixture(scope="module", params=["z-image", "qwen-image"])
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, sparse_checkpoint.write(request.param, folder)


def test_is_as_large_as_the_real_one(written):
    family, folder, total = written
    assert total == 2 * sum(PARAMETERS[family])
    files = list(folder.rglob("*.safetensors"))
    assert total < sum(file.stat().st_size for file in files) < total + 2e6


def test_takes_no_disk(written):
    _, folder, _ = written
    assert sum(512 * file.stat().st_blocks for file in folder.rglob("*")) < 5e6


def test_tensors_are_the_real_ones(written):
    family, folder, _ = written
    for component, tensors, parameters in zip(COMPONENTS, TENSORS[family], PARAMETERS[family], strict=True):
        shapes = {}
        for file in (folder / component).glob("*.safetensors"):
            with safe_open(file, "np") as opened:
                shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        assert len(shapes) == tensors
        assert sum(math.prod(shape) for shape in shapes.values()) == parameters


def test_names_are_those_of_old_files(written):
    family, folder, _ = written
    names = json.loads((folder / "text_encoder" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert ("lm_head.weight" in names) == (family == "qwen-image")
    assert any(name.startswith("visual.blocks.31.") for name in names) == (family == "qwen-image")
    assert not any("language_model" in name for name in names)


def test_shards_are_as_many_as_the_real_ones(written):
    family, folder, _ = written
    count = {component: len(list((folder / component).glob("*.safetensors"))) for component in COMPONENTS}
    assert (
        count
        == {
            "z-image": {"transformer": 3, "text_encoder": 3, "vae": 1},
            "qwen-image": {"transformer": 9, "text_encoder": 4, "vae": 1},
        }[family]
    )
    sizes = [file.stat().st_size for file in (folder / "transformer").glob("*.safetensors")]
    assert max(sizes) < 1.25 * min(sizes)


def test_float32_is_twice_as_large(tmp_path):
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 2)}
    half = sparse_checkpoint.write_holes(tmp_path / "half.safetensors", "bfloat16", shapes, 1)
    full = sparse_checkpoint.write_holes(tmp_path / "full.safetensors", "float32", shapes, 2)
    assert (half, full) == (2 * 26, 4 * 26)
    with safe_open(tmp_path / "full-00001-of-00002.safetensors", "np") as opened:
        assert (opened.get_tensor("a") == 0).all()
        assert opened.get_tensor("a").dtype == "float32"
