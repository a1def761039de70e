from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import reference
from tests.training import toy
from zimgkit.engines.bundle import ReferencePictures
from zimgkit.engines.errors import UsageError
from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.training import families
from zimgkit.training.dataset import DatasetError
from zimgkit.training.editor import as_editor
from zimgkit.training.stages import LORA, Table, train_diffusion, train_lora, train_model_tokenizer

SETTINGS = replace(LORA, steps=2, batch_size=2, warmup=1, save_every=1)
EDITS = Table(("image", "edit_image"), ("edit_image",))
PROCESSOR = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}


@torch.no_grad()
def test_a_prompt_about_pictures_is_read_as_by_diffusers() -> None:
    pipeline = reference.qwen_image_edit(several=True)
    family = families.family("qwen-image")
    pictures = [Image.radial_gradient("L").resize(size).convert("RGB") for size in ((112, 112), (140, 84))]
    references = ReferencePictures("Picture {number}: ", 112 * 112, 1024 * 1024, 3)
    prompts = ["make the circle blue", "make the circle red."]
    for prompt in prompts:
        (one,) = family.pictured_inputs(pipeline.tokenizer, [prompt], pictures[:1], references, PROCESSOR)
        found = family.encode_pictured(pipeline.text_encoder, [one])
        expected, _ = pipeline._get_qwen_prompt_embeds(prompt, [sized(pictures[0], references)])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    # Several prompts of one length are read together.
    both = ["make it red", "make it big"]
    inputs = family.pictured_inputs(pipeline.tokenizer, both, pictures, references, PROCESSOR)
    together = family.encode_pictured(pipeline.text_encoder, inputs)
    for one, row in zip(inputs, together, strict=True):
        torch.testing.assert_close(family.encode_pictured(pipeline.text_encoder, [one])[0], row, atol=1e-5, rtol=1e-4)


def sized(picture: Image.Image, references: ReferencePictures) -> Image.Image:
    from zimgkit.runtime.pictures.resizing import calculate_dimensions, resize

    return resize(picture, *calculate_dimensions(references.vision_area, picture.width / picture.height))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data``, ``model`` and ``zimg-tiny-qwen-edit``, which edits small pictures."""
    folder = tmp_path_factory.mktemp("frozen")
    data = toy.dataset(folder / "data", count=4)
    train_model_tokenizer(data, folder / "model", "qwen-image", configs=toy.CONFIGS["qwen-image"])
    as_editor(open_checkpoint(str(folder / "model")), folder / "zimg-tiny-qwen-edit")
    (data / "metadata.csv").unlink()
    rows = [{"image": f"{i}.png", "prompt": "swap", "edit_image": [f"{i - 1}.png", "2.png"][: i + 1]} for i in (1, 2)]
    rows[0]["edit_image"] = "0.png"
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mask = Image.new("L", (32, 32), 255)
    mask.save(data / "mask.png")
    row = {"image": "1.png", "prompt": "a", "eligen_entity_prompts": ["b"], "eligen_entity_masks": ["mask.png"]}
    (data / "regions.jsonl").write_text(json.dumps(row))
    return folder


def test_models_that_edit_are_adapted_and_trained(begun: Path, tmp_path: Path) -> None:
    model = str(begun / "zimg-tiny-qwen-edit")
    train_lora(model, begun / "data", tmp_path / "a.safetensors", SETTINGS, rank=2, table=EDITS)
    assert load_file(tmp_path / "a.safetensors")
    train_diffusion(model, begun / "data", tmp_path / "whole", SETTINGS, with_text=False, table=EDITS)
    trained = open_checkpoint(str(tmp_path / "whole"))
    assert trained.pipeline == "QwenImageEditPlusPipeline"
    texts = [path / "text_encoder" / "model.safetensors" for path in (begun / "model", tmp_path / "whole")]
    assert texts[0].read_bytes() == texts[1].read_bytes()


def test_regions_are_adapted_and_resume_to_the_same_bits(begun: Path, tmp_path: Path) -> None:
    columns = ("eligen_entity_prompts", "eligen_entity_masks")
    table = Table(("image", columns[1]), columns, path=begun / "data" / "regions.jsonl")
    arguments = (str(begun / "model"), begun / "data")

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    train_lora(*arguments, tmp_path / "a.safetensors", SETTINGS, rank=2, table=table)
    with pytest.raises(KeyboardInterrupt):
        train_lora(*arguments, tmp_path / "b.safetensors", SETTINGS, rank=2, table=table, log=stop)
    train_lora(*arguments, tmp_path / "b.safetensors", SETTINGS, rank=2, table=table, resume=True)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_what_does_not_fit(begun: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    with pytest.raises(UsageError, match="model edits no pictures"):
        train_lora(str(begun / "model"), begun / "data", out, SETTINGS, table=EDITS)
    with pytest.raises(UsageError, match="add --trainable-models dit"):
        train_diffusion(str(begun / "model"), begun / "data", tmp_path / "whole", SETTINGS, table=EDITS)
    many = {"image": "1.png", "prompt": "a", "edit_image": ["0.png"] * 4}
    (tmp_path / "many.jsonl").write_text(json.dumps(many))
    table = replace(EDITS, path=tmp_path / "many.jsonl")
    with pytest.raises(DatasetError, match=r"many.jsonl, line 1: 4 pictures, and zimg-tiny-qwen-edit takes 3"):
        train_lora(str(begun / "zimg-tiny-qwen-edit"), begun / "data", out, SETTINGS, table=table)
