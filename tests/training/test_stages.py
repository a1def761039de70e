from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline, ZImagePipeline
from safetensors.torch import load_file

from tests.training import toy
from zimgkit.engines.errors import CheckpointError, OutputError, UsageError
from zimgkit.export.build import build
from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.runtime import Pipeline
from zimgkit.training import families
from zimgkit.training.dataset import DatasetError, read_dataset
from zimgkit.training.diffusion import denoiser_task
from zimgkit.training.latents import cache_latents
from zimgkit.training.loop import Settings, train
from zimgkit.training.stages import (
    run_of,
    train_demo,
    train_diffusion,
    train_model_tokenizer,
    train_vae,
)

FAMILIES = list(toy.CONFIGS)
TOY = families.family("z-image")
QUICK: dict[str, Settings] = {
    "vae": replace(TOY.vae_settings, steps=4, batch_size=2, warmup=1, save_every=2),
    "diffusion": replace(TOY.diffusion_settings, steps=4, batch_size=2, warmup=1, save_every=2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_demo_model_builds_and_draws_what_diffusers_draws(family: str, tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    train_demo(family, out, make_data=toy.dataset, configs=toy.CONFIGS[family], **QUICK)
    assert {path.name for path in out.iterdir()} == {
        "model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae",
    }  # fmt: skip
    for file in out.rglob("*.safetensors"):
        assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}, file
    for name in ("loss.png", "preview.png", "preview.txt"):
        assert (tmp_path / "tiny.run" / "finished.run" / name).exists()

    build(str(out), tmp_path / "bundle", precision="fp32")
    options: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 3}
    kind, scale = (ZImagePipeline, "guidance_scale") if family == "z-image" else (QwenImagePipeline, "true_cfg_scale")
    pipeline = kind.from_pretrained(out, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    reference = pipeline(
        ["a red circle"],
        negative_prompt=["蓝色"],
        generator=torch.Generator().manual_seed(5),
        output_type="np",
        **{scale: 2.0},
        **options,
    ).images[0]
    with Pipeline.open(tmp_path / "bundle") as own:
        found = own(
            "a red circle", negative_prompt="蓝色", seed=5, guidance_scale=2.0, output_type="np", **options
        ).images[0]
    assert np.abs(found - reference).max() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_one_picture_is_learned_by_heart(family: str, tmp_path: Path) -> None:
    data, begun = toy.dataset(tmp_path / "data", count=1), tmp_path / "begun"
    train_model_tokenizer(data, begun, family, configs=toy.CONFIGS[family])
    dataset, checkpoint = read_dataset(data), open_checkpoint(str(begun))
    task = denoiser_task(checkpoint, dataset, cache_latents(checkpoint, dataset, tmp_path / "cache"))
    lines: list[str] = []
    settings = replace(TOY.diffusion_settings, steps=150, batch_size=8, learning_rate=5e-3, warmup=10, save_every=50)
    train(task, tmp_path / "run", settings, log=lines.append)
    first, last = (float(lines[index].split("loss ")[1].split(",")[0]) for index in (0, -1))
    assert last < 0.5 * first


@pytest.mark.parametrize("family", FAMILIES)
def test_a_broken_demo_goes_on_to_the_same_result(family: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"make_data": toy.dataset, "configs": toy.CONFIGS[family], **QUICK}
    train_demo(family, tmp_path / "a", **options)
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) in (1, 3):
            raise KeyboardInterrupt

    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            train_demo(family, tmp_path / "b", log=stop, resume=resume, **options)
    with pytest.raises(OutputError, match=r"b\.run holds a run already; add --resume"):
        train_demo(family, tmp_path / "b", **options)
    train_demo(family, tmp_path / "b", log=stop, resume=True, **options)
    assert [line.split(",")[0] for line in lines] == [
        "vae: step 2 of 4", "vae: step 4 of 4", "diffusion: step 2 of 4", "diffusion: step 4 of 4",
    ]  # fmt: skip
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    with pytest.raises(OutputError, match="a exists already"):
        train_demo(family, tmp_path / "a", resume=True, **options)


def test_another_dataset_is_not_resumed_with(tmp_path: Path) -> None:
    data, begun, out = toy.dataset(tmp_path / "data"), tmp_path / "begun", tmp_path / "out"
    train_model_tokenizer(data, begun, "z-image", configs=toy.CONFIGS["z-image"])

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_vae(begun, data, out, QUICK["vae"], log=stop)
    assert not out.exists()
    (data / "metadata.csv").write_text("image,prompt\n0.png,another\n")
    with pytest.raises(CheckpointError, match="cannot be resumed: its dataset is"):
        train_vae(begun, data, out, QUICK["vae"], resume=True)
    (data / "metadata.csv").write_text("image,prompt\n0.png,\n")
    with pytest.raises(DatasetError, match="is empty"):
        train_diffusion(begun, data, tmp_path / "other", QUICK["diffusion"])
    assert not run_of(tmp_path / "other").exists()


def test_what_a_run_needs_is_asked_for_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, begun, out = toy.dataset(tmp_path / "data"), tmp_path / "begun", tmp_path / "out"
    train_model_tokenizer(data, begun, "z-image", configs=toy.CONFIGS["z-image"])
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(UsageError, match="--compile needs a C"):
        train_diffusion(begun, data, out, replace(QUICK["diffusion"], compile=True))
    assert not list(tmp_path.glob("out*"))


def test_a_failed_world_leaves_nothing_to_mistake(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_demo("z-image", tmp_path / "a", make_data=fail, configs=toy.CONFIGS["z-image"], **QUICK)
    train_demo("z-image", tmp_path / "a", make_data=toy.dataset, configs=toy.CONFIGS["z-image"], resume=True, **QUICK)


def test_a_stage_that_has_saved_nothing_begins_anew(tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        assert stage == "vae"
        raise KeyboardInterrupt

    options: dict[str, Any] = {"make_data": toy.dataset, "configs": toy.CONFIGS["z-image"], **QUICK}
    with pytest.raises(KeyboardInterrupt):
        train_demo("z-image", tmp_path / "a", report=stop, **options)
    assert run_of(tmp_path / "a.run" / "with-vae").is_dir()
    train_demo("z-image", tmp_path / "a", resume=True, **options)
    assert (tmp_path / "a").is_dir()


def test_both_demo_models_together_are_at_most_12_megabytes(tmp_path: Path) -> None:
    data, size = toy.dataset(tmp_path / "data"), 0
    for family in FAMILIES:
        folder = tmp_path / family
        train_model_tokenizer(data, folder, family)
        # Stored in float32 before they are trained.
        size += sum(path.stat().st_size for path in folder.rglob("*.safetensors")) // 2
    vocabulary = 2 * 2 * 96 * 600  # The toy's captions have few words.
    assert size + vocabulary < 11.8e6
