from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.commands import invoke
from tests.training import toy
from zimgkit.engines.bundle import CPU_GRAPH, Bundle
from zimgkit.engines.errors import CheckpointError, OutputError
from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.runtime import Pipeline, demo_models
from zimgkit.runtime.demo_models.assembled import DIFFERENCE, SCALE, WEIGHTS, put_together
from zimgkit.training.checkpoint import derive_checkpoint
from zimgkit.training.cli import main
from zimgkit.training.ship import ship
from zimgkit.training.stages import train_model_tokenizer


@pytest.fixture(scope="module", params=["z-image", "qwen-image"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ship")
    begun = folder / "begun"
    train_model_tokenizer(toy.dataset(folder / "data"), begun, request.param, configs=toy.CONFIGS[request.param])
    opened = open_checkpoint(str(begun))
    from zimgkit.training.checkpoint import load_component

    parts = {name: load_component(opened, name) for name in ("transformer", "text_encoder", "vae")}
    derive_checkpoint(begun, folder / "toy-model", parts)
    return folder / "toy-model"


def test_a_folder_is_checkpoint_and_bundle(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "toy"
    ship(checkpoint, out)
    manifest = Bundle.open(out).manifest
    assert (manifest.name, manifest.precision, manifest.checkpoint.model) == ("toy-model", "bfloat16", "toy-model")
    assert str(checkpoint.parent) not in (out / "bundle.json").read_text()
    again = open_checkpoint(str(out))
    for component in ("transformer", "text_encoder", "vae"):
        assert set(again.tensors(component)) == set(open_checkpoint(str(checkpoint)).tensors(component))
    weights = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    own = sum(file.stat().st_size for file in checkpoint.rglob("*.safetensors"))
    assert weights < 1.2 * own  # Qwen-Image's folded decoder is the only thing there twice.
    with Pipeline.open(out) as pipeline:
        assert pipeline("a red square", height=32, width=32, num_inference_steps=1, seed=0).images[0].size == (32, 32)
    with pytest.raises(OutputError, match="exists"):
        ship(checkpoint, out)
    ship(checkpoint, out, tasks=["inpaint"], overwrite=True)
    assert Bundle.open(out).manifest.tasks == ("text-to-image", "inpaint")
    assert "vae_encoder" in Bundle.open(out).manifest.components


def test_what_is_not_in_bfloat16_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    derive_checkpoint(checkpoint, wide, {})
    file = next((wide / "text_encoder").glob("*.safetensors"))
    save_file({name: value.float() for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not share text_encoder.safetensors .*store it in bf16"):
        ship(wide, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_editor_is_what_it_does_not_share(tmp_path: Path) -> None:
    """Of the carried model, made one that edits, with two tensors changed: both together are a bundle that draws."""
    base, edited = demo_models.locate("zimg-tiny-qwen"), tmp_path / "my-editor"
    assert invoke(main, "editor", "zimg-tiny-qwen", edited).code == 0
    weights = load_file(edited / WEIGHTS)
    for name in ("img_in.weight", "img_in.bias"):
        weights[name] = weights[name] * 1.5
    save_file(weights, edited / WEIGHTS, {"format": "pt"})
    assert invoke(main, "ship-editor", edited, "zimg-tiny-qwen", tmp_path / "out", "--quiet").code == 0
    stored = load_file(tmp_path / "out" / DIFFERENCE)
    assert stored.keys() == {"img_in.weight", f"img_in.weight{SCALE}", "img_in.bias"}
    shared = ["vae_encoder.safetensors", "text_encoder/model.safetensors", WEIGHTS]
    assert not [name for name in shared if (tmp_path / "out" / name).exists()]
    put_together(tmp_path / "whole", tmp_path / "out", base)
    bundle = Bundle.open(tmp_path / "whole")
    assert [*bundle.mismatches(afresh=True)] == [] and bundle.manifest.tasks == ("edit",)
    assert not any(CPU_GRAPH in component.graphs for component in bundle.manifest.components.values())
    picture = Image.new("RGB", (64, 64), "white")
    with Pipeline.open(tmp_path / "whole") as pipeline:
        drawn = pipeline("remove it", image=picture, height=64, width=64, num_inference_steps=1, seed=0).images[0]
    assert drawn.size == (64, 64)
    again = invoke(main, "ship-editor", tmp_path / "none", "zimg-tiny-qwen", tmp_path / "other", "--quiet")
    assert again.code == 1 and again.err.count("\n") == 1, again.err
    assert not (tmp_path / "other").exists()
