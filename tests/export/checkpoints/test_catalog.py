"""The catalog of names: what it finds, what it refuses, which defaults it gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from zimgkit.engines.bundle import Defaults
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.checkpoints import catalog

TURBO, Z_BASE, QWEN = Defaults(8, 0.0, 1024, 1024), Defaults(50, 4.0, 1024, 1024), Defaults(50, 4.0, 1328, 1328, " ")


@pytest.mark.parametrize(
    ("model", "hub_id"),
    [
        ("Z-Image-Turbo", "Tongyi-MAI/Z-Image-Turbo"),
        ("z-image-turbo", "Tongyi-MAI/Z-Image-Turbo"),
        ("Z-IMAGE", "Tongyi-MAI/Z-Image"),
        ("qwen-image", "Qwen/Qwen-Image"),
        ("Qwen-Image-2512", "Qwen/Qwen-Image-2512"),
        ("qwen/qwen-image", "Qwen/Qwen-Image"),
        ("Qwen/Qwen-Image", "Qwen/Qwen-Image"),
        ("someone/my-finetune", "someone/my-finetune"),
        ("someone/Qwen-Image", "someone/Qwen-Image"),
    ],
)
def test_names_stand_for_hub_ids(model: str, hub_id: str) -> None:
    assert catalog.resolve(model) == hub_id


@pytest.mark.parametrize(
    "model",
    [
        "z-image-edit",
        "DiffSynth-Studio/Qwen-Image-Distill-Full",
    ],
)
def test_what_is_planned_is_refused(model: str) -> None:
    message = r"zimgkit does not serve \S+ yet; it serves Z-Image-Turbo, Z-Image, .*Qwen-Image, Qwen-Image-2512, "
    with pytest.raises(CheckpointError, match=message) as caught:
        catalog.resolve(model)
    assert model.rpartition("/")[2].casefold() in str(caught.value).casefold()


@pytest.mark.parametrize("model", ["Z-Image-i2L", "diffsynth-studio/z-image-i2l"])
def test_what_makes_loras_is_no_checkpoint(model: str) -> None:
    with pytest.raises(CheckpointError, match="makes LoRAs of pictures; make one with: zimg-export i2l Z-Image "):
        catalog.resolve(model)


@pytest.mark.parametrize("model", ["Qwen-Image-EliGen-V2", "diffsynth-studio/qwen-image-eligen-v2"])
def test_a_lora_is_no_checkpoint(model: str) -> None:
    message = "EliGen-V2 is a LoRA; build it with --model Qwen-Image --lora DiffSynth-Studio/Qwen-Image-EliGen-V2/model"
    with pytest.raises(CheckpointError, match=message):
        catalog.resolve(model)


@pytest.mark.parametrize("hub_id", catalog.CONTROLNETS)
def test_a_controlnet_is_no_checkpoint(hub_id: str) -> None:
    name = hub_id.rpartition("/")[2]
    for model in (hub_id, name.lower()):
        with pytest.raises(CheckpointError, match=rf"{name} is a ControlNet; .* --controlnet {hub_id}"):
            catalog.resolve(model)


@pytest.mark.parametrize(
    ("model", "guess"),
    [("Z-Image-Trubo", "Z-Image-Turbo"), ("qwen_image", "Qwen-Image"), ("qwenimage2512", "Qwen-Image-2512")],
)
def test_a_typing_error_gets_a_suggestion(model: str, guess: str) -> None:
    with pytest.raises(CheckpointError, match=rf"no checkpoint is called '{model}'; did you mean .*{guess}") as caught:
        catalog.resolve(model)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_gets_the_list() -> None:
    with pytest.raises(CheckpointError, match=r"; name a local folder, a hub id .* one of Z-Image-Turbo, Z-Image, "):
        catalog.resolve("flux")


def test_names_are_unique() -> None:
    names = [entry.name.casefold() for entry in catalog.SERVED] + [
        i.rpartition("/")[2].casefold() for i in (*catalog.PLANNED, *catalog.LORAS, *catalog.CONTROLNETS)
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/models/Z-Image-Turbo", "Z-Image-Turbo"),
        ("/models/z-image-turbo/", "Z-Image-Turbo"),
        ("/models/other/../Qwen-Image", "Qwen-Image"),
        ("/cache/hub/models--Qwen--Qwen-Image-2512/snapshots/0b1c", "Qwen-Image-2512"),
        ("/cache/modelscope/models/Tongyi-MAI--Z-Image/snapshots/master", "Z-Image"),
        ("/models/Z-Image/my-finetune", "my-finetune"),
        ("/models/snapshots/mine", "mine"),
        ("Qwen-Image", "Qwen-Image"),
    ],
)
def test_folders_have_names(folder: str, name: str) -> None:
    assert catalog.short_name(folder) == name
    assert catalog.short_name(Path(folder)) == name


@pytest.mark.parametrize(
    ("folder", "family", "shift", "defaults"),
    [
        ("Z-Image-Turbo", "z-image", 6.0, TURBO),
        ("/models/z-image", "z-image", 3.0, Z_BASE),
        ("/models/finetune", "z-image", 3.0, TURBO),
        ("/models/finetune", "z-image", 6.0, Z_BASE),
        ("/models/finetune", "z-image", None, Z_BASE),
        ("/models/Qwen-Image", "z-image", 6.0, Z_BASE),
        ("/models/finetune", "qwen-image", 1.0, QWEN),
        ("/models/Z-Image-Turbo", "qwen-image", 3.0, QWEN),
        ("/cache/models--Qwen--Qwen-Image-2512/snapshots/0b1c", "qwen-image", 1.0, QWEN),
    ],
)
def test_defaults_follow_the_name_then_the_scheduler(
    folder: str, family: str, shift: float | None, defaults: Defaults
) -> None:
    config = {} if shift is None else {"shift": shift}
    assert catalog.defaults_for(folder, family, config) == defaults
