from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel, ZImagePipeline, ZImageTransformer2DModel
from safetensors.torch import load_file
from torch import nn

from tests.training import toy
from zimgkit.engines.errors import UsageError
from zimgkit.training import families
from zimgkit.training.lora import LoraLinear, add_adapters, write_lora
from zimgkit.training.stages import LORA, Table, train_lora, train_model_tokenizer

FAMILIES = {
    "z-image": (ZImageTransformer2DModel, ZImagePipeline, 7 * 4),
    "qwen-image": (QwenImageTransformer2DModel, QwenImagePipeline, 12 * 2 - 3),
}
SETTINGS = replace(LORA, steps=4, batch_size=2, warmup=1, save_every=2)


@pytest.fixture(scope="module", params=list(FAMILIES))
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("lora")
    toy.dataset(folder / "data")
    train_model_tokenizer(folder / "data", folder / "model", request.param, configs=toy.CONFIGS[request.param])
    return request.param, folder


def test_the_file_has_the_keys_of_diffsynth_which_diffusers_knows(begun: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = begun
    out = tmp_path / "style.safetensors"
    train_lora(str(folder / "model"), folder / "data", out, SETTINGS, rank=3)
    stored = load_file(out)
    kind, pipeline, count = FAMILIES[family]
    transformer = kind.from_pretrained(folder / "model" / "transformer")
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    modules = set()
    for key, value in stored.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.default\.weight", key)
        assert match, key
        linear = linears[match[1]]
        assert value.shape == ((3, linear.in_features) if match[2] == "A" else (linear.out_features, 3))
        assert value.dtype == torch.bfloat16
        modules.add(match[1])
    assert len(modules) == count
    assert len(stored) == 2 * count
    # Without peft, diffusers converts the keys but cannot load them.
    converted = pipeline.lora_state_dict(dict(stored))
    expected = {f"transformer.{name}.lora_{part}.weight" for name in modules for part in "AB"}
    assert {name for name, value in converted.items() if isinstance(value, torch.Tensor)} == expected


def test_it_resumes(begun: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = begun
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    arguments = (str(folder / "model"), folder / "data")
    train_lora(*arguments, first, SETTINGS, rank=2, gradient_checkpointing=True)
    lines: list[str] = []

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_lora(*arguments, second, SETTINGS, rank=2, log=stop)
    train_lora(*arguments, second, SETTINGS, rank=2, resume=True, log=lines.append)
    assert len(lines) == 1
    assert first.read_bytes() == second.read_bytes()


def transformer_of(family: str) -> Any:
    kind = FAMILIES[family][0]
    torch.manual_seed(0)
    model = kind(**toy.CONFIGS[family]["transformer"])
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * (0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_the_sum_of_its_linear_and_a_product(family: str) -> None:
    model = transformer_of(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = families.family(family)
    add_adapters(model, own, own.lora_targets, rank=4, seed=1)
    x = torch.randn(2, 5, 48)
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    name, module = next(iter(adapted.items()))
    weight, bias = before[f"{name}.weight"], before.get(f"{name}.bias")
    torch.testing.assert_close(module(x), nn.functional.linear(x, weight, bias))
    module.lora_B.data.normal_()
    merged = weight + module.lora_B.data @ module.lora_A.data
    torch.testing.assert_close(module(x), nn.functional.linear(x, merged, bias), atol=1e-5, rtol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{part}" for name in adapted for part in "AB"}


def test_chosen_targets() -> None:
    model = transformer_of("z-image")
    add_adapters(model, families.family("z-image"), "layers.1.attention.to_q, w2", rank=1, seed=0)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    assert len(adapted) == 1 + 4
    assert "layers.1.attention.to_q" in adapted


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [("to_q,qkv", 2, "--targets: no linear is called qkv; there are .*to_q"), ("to_q", 0, "--rank is 0")],
)
def test_bad_choices(targets: str, rank: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        add_adapters(transformer_of("z-image"), families.family("z-image"), targets, rank, seed=0)


def test_the_name_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"let its name end in \.safetensors"):
        train_lora("model", tmp_path, tmp_path / "style.pt")


def test_weights_are_stored_as_given(tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", {"transformer.layers.0.to_q.lora_A": torch.ones(2, 3)}, "float32")
    stored = load_file(tmp_path / "a.safetensors")
    assert list(stored) == ["layers.0.to_q.lora_A.default.weight"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_it_goes_on_from_another_or_beside_one_that_is_held(begun: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = begun
    arguments = (str(folder / "model"), folder / "data")
    first, second, third = (tmp_path / f"{name}.safetensors" for name in "abc")
    train_lora(*arguments, first, SETTINGS, rank=3, targets="to_q")
    train_lora(*arguments, second, replace(SETTINGS, steps=1, learning_rate=1e-12), rank=8, begin=str(first))
    stored = load_file(first)
    assert all(value.equal(stored[name]) for name, value in load_file(second).items())
    train_lora(*arguments, third, replace(SETTINGS, steps=1), rank=2, targets="to_k", held=str(first))
    assert not load_file(third).keys() & stored.keys()


def test_epochs_make_steps(begun: tuple[str, Path]) -> None:
    _, folder = begun
    table = Table(repeat=3, epochs=2)
    assert table.paced(SETTINGS, table.read(folder / "data")).steps == 6 * 3 * 2 // 2
    assert Table().paced(SETTINGS, table.read(folder / "data")).steps == SETTINGS.steps
