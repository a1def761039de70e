from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel, ZImageControlNetModel, ZImageTransformer2DModel
from safetensors.torch import load_file

from tests.training import toy
from zimgkit.engines.errors import CheckpointError, UsageError
from zimgkit.export.controls.nets import open_nets
from zimgkit.training.stages import CONTROL, Table, train_control, train_lora, train_model_tokenizer

SETTINGS = replace(CONTROL, steps=3, batch_size=2, warmup=1, save_every=1)
PLAIN = Table(("image", "control_image"), ("control_image",))


@pytest.fixture(scope="module", params=["z-image", "qwen-image"])
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("control")
    data = toy.dataset(folder / "data", count=4)
    train_model_tokenizer(data, folder / "model", request.param, configs=toy.CONFIGS[request.param])
    # An untrained transformer predicts nothing, whatever controls it.
    kind = {"z-image": ZImageTransformer2DModel, "qwen-image": QwenImageTransformer2DModel}[request.param]
    transformer = kind.from_pretrained(folder / "model" / "transformer")
    torch.manual_seed(0)
    for parameter in transformer.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    transformer.save_pretrained(folder / "model" / "transformer")
    rows = [f"{index}.png,a circle,{(index + 1) % 4}.png" for index in range(4)]
    (data / "metadata.csv").write_text("\n".join(["image,prompt,control_image", *rows]))
    return request.param, folder


def test_a_net_has_the_keys_of_published_ones_and_resumes_to_the_same_bits(
    begun: tuple[str, Path], tmp_path: Path
) -> None:
    family, folder = begun
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    arguments = (str(folder / "model"), folder / "data")
    train_control(*arguments, first, SETTINGS)
    stops = iter([True, True, False])

    def stop(line: str) -> None:
        if next(stops):
            raise KeyboardInterrupt

    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            train_control(*arguments, second, SETTINGS, resume=resume, log=stop)
    train_control(*arguments, second, SETTINGS, resume=True, log=stop)
    assert first.read_bytes() == second.read_bytes()
    # zimg takes it for a net of this checkpoint, and so does diffusers where it has such nets.
    transformer = {**toy.CONFIGS[family]["transformer"]}
    (net,) = open_nets([f"edges={first}"], family, transformer)
    stored = load_file(first)
    assert net.net.kind == ("fun" if family == "z-image" else "blockwise")
    assert any(value.float().abs().max() > 0 for name, value in stored.items() if "_proj.weight" in name)
    if family == "z-image":
        config: dict[str, Any] = {name: transformer[name] for name in ("dim", "n_refiner_layers", "n_heads")}
        reference = ZImageControlNetModel(
            control_layers_places=[0],
            control_refiner_layers_places=[0],
            control_in_dim=4,
            add_control_noise_refiner="control_layers",
            n_kv_heads=3,
            **config,
        )
        reference.load_state_dict({name: value.float() for name, value in stored.items()})
    else:
        own = ("x_rms.weight", "y_rms.weight", "input_proj.weight", "output_proj.weight")
        wanted = {f"controlnet_blocks.{index}.{name}" for index in range(2) for name in own}
        wanted |= {name.replace("proj.weight", "proj.bias") for name in wanted if "proj" in name}
        assert stored.keys() == wanted | {"img_in.weight", "img_in.bias"}
    # From a file it goes on with the same weights: with no steps' worth of a rate they stay.
    third = tmp_path / "c.safetensors"
    train_control(
        *arguments, third, replace(SETTINGS, steps=1, learning_rate=1e-12, muon_learning_rate=1e-12), begin=first
    )
    assert all(value.equal(stored[name]) for name, value in load_file(third).items())


def test_what_a_net_cannot_be(begun: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = begun
    arguments = (str(folder / "model"), folder / "data", tmp_path / "a.safetensors", SETTINGS)
    with pytest.raises(UsageError, match=f"{family} has no ControlNets of the kind union"):
        train_control(*arguments, kind="union")
    with pytest.raises(UsageError, match="names no picture that controls"):
        train_control(*arguments, table=Table())
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors cannot be read"):
        train_control(*arguments, begin=tmp_path / "broken.safetensors")


def test_loras_take_other_pictures(begun: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = begun
    data = tmp_path / "data"
    data.symlink_to(folder / "data")
    text = (folder / "data" / "metadata.csv").read_text().replace("control_image", "context_image")
    table = tmp_path / "context.csv"
    table.write_text(text)
    columns = Table(("image", "context_image"), ("context_image",), path=table)
    arguments = (str(folder / "model"), data, tmp_path / "a.safetensors", SETTINGS)
    if family == "z-image":
        with pytest.raises(UsageError, match="z-image draws beside no other pictures"):
            train_lora(*arguments, rank=2, table=columns)
        return
    train_lora(*arguments, rank=2, table=columns)
    assert load_file(tmp_path / "a.safetensors")
