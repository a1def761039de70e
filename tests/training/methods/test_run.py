"""The tasks as they are asked for: what they leave, what they go on from, what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import invoke
from zimgkit.engines.errors import LoraError, OutputError, UsageError
from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.runtime import demo_models
from zimgkit.training.checkpoint import load_component
from zimgkit.training.cli import main
from zimgkit.training.lora import LoraLinear
from zimgkit.training.methods.cache import Cache
from zimgkit.training.methods.held import begin_with, hold_lora, read_adapters
from zimgkit.training.methods.process import DISTILL, IMITATE, SFT, FewSteps
from zimgkit.training.methods.run import FULL, Method, run_method
from zimgkit.training.stages import LORA, train_lora

MODEL = "zimg-tiny-z"
BOLT = f"{MODEL}-bolt"
SETTINGS = replace(LORA, steps=3, batch_size=2, warmup=1, save_every=1)
CacheOf = Callable[[str, str], Cache]


def losses(run: Path) -> list[float]:
    found: list[float] = load_file(run / "state.safetensors")["losses"].tolist()
    return found


def test_two_stages_are_the_one_stage_run_within_rounding(pictures: Path, cache_of: CacheOf, tmp_path: Path) -> None:
    cache = cache_of(MODEL, SFT)
    run_method(MODEL, cache.root, tmp_path / "a.safetensors", Method("sft:train", lora_rank=2), SETTINGS)
    train_lora(MODEL, pictures, tmp_path / "b.safetensors", SETTINGS, rank=2)
    assert losses(tmp_path / "a.safetensors.run") == pytest.approx(losses(tmp_path / "b.safetensors.run"), rel=1e-3)


@pytest.mark.parametrize("method", [DISTILL, IMITATE])
def test_it_resumes_to_the_same_bits_however_often_it_is_stopped(
    method: str, cache_of: CacheOf, tmp_path: Path
) -> None:
    cache = cache_of(MODEL, method).root
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    how = Method(f"{method}:train", lora_rank=2, lora_target_modules="to_q")

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    run_method(MODEL, cache, whole, how, SETTINGS)
    for restarts in range(3):
        with pytest.raises(KeyboardInterrupt):
            run_method(MODEL, cache, parts, how, SETTINGS, resume=restarts > 0, log=stop)
    run_method(MODEL, cache, parts, how, SETTINGS, resume=True)
    assert whole.read_bytes() == parts.read_bytes()
    assert losses(tmp_path / "whole.safetensors.run") == losses(tmp_path / "parts.safetensors.run")


def test_both_stages_at_once_make_a_checkpoint_with_the_schedule_of_the_student(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("train", MODEL, pictures, tmp_path / "out", "--task", "direct_distill", "--quiet")
    few = ("--num_inference_steps", 2, "--shift", 2, "--teacher_num_inference_steps", 2, "--steps", 1)
    with monkeypatch.context() as patched:
        patched.setattr("zimgkit.training.devices.find_spec", lambda name: None)
        result = invoke(main, *arguments, *few, "--batch_size", 1, "--report-to", "tensorboard")
    result.assert_refused("tensorboard is not installed; pip install tensorboard", 1)
    result = invoke(main, *arguments, *few, "--batch_size", 1)
    assert result.code == 0, result
    made = open_checkpoint(str(tmp_path / "out"))
    assert made.config("scheduler")["shift"] == 2
    before, after = (load_component(open_checkpoint(str(one)), "transformer") for one in (MODEL, tmp_path / "out"))
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2


def test_a_held_lora_is_in_the_weights_and_not_in_the_file(cache_of: CacheOf, tmp_path: Path) -> None:
    """By hand: W + B A."""
    checkpoint = open_checkpoint(MODEL)
    plain, held = (load_component(checkpoint, "transformer") for _ in range(2))
    hold_lora(held, checkpoint, BOLT)
    stored = load_file(demo_models.locate_lora(BOLT))
    with_it = dict(held.named_parameters())
    for name, weight in plain.named_parameters():
        module, expected = name.removesuffix(".weight"), weight
        if f"{module}.lora_A.default.weight" in stored:
            down, up = (stored[f"{module}.lora_{part}.default.weight"].float() for part in "AB")
            expected = weight + up @ down
            assert not torch.equal(expected, weight)
        torch.testing.assert_close(with_it[name], expected, rtol=1e-5, atol=1e-6)
    out = tmp_path / "new.safetensors"
    method = Method("sft:train", lora_rank=1, lora_target_modules="w2", preset_lora_path=BOLT)
    run_method(MODEL, cache_of(MODEL, SFT).root, out, method, replace(SETTINGS, steps=1))
    assert all(".w2.lora_" in key for key in load_file(out))


def test_adapters_go_on_from_a_file(cache_of: CacheOf, tmp_path: Path) -> None:
    out = tmp_path / "more.safetensors"
    method = Method("sft:train", lora_checkpoint=BOLT)
    run_method(MODEL, cache_of(MODEL, SFT).root, out, method, replace(SETTINGS, steps=1, learning_rate=1e-9))
    found, begun = load_file(out), load_file(demo_models.locate_lora(BOLT))
    assert found.keys() == begun.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, begun[name], rtol=1e-2, atol=1e-6)


def test_a_teacher_with_loras_goes_on_where_it_was_broken_off(pictures: Path, tmp_path: Path) -> None:
    """It is merged anew then, and known for the same."""
    how = Method(f"{IMITATE}:data_process", lora_checkpoint=BOLT, teacher={"num_inference_steps": 4})
    how = replace(how, student=FewSteps(1))
    run_method(MODEL, pictures, tmp_path / "cache", how, SETTINGS)
    before = (tmp_path / "cache" / "000000.safetensors").read_bytes()
    (tmp_path / "cache" / "000000.safetensors").unlink()
    run_method(MODEL, pictures, tmp_path / "cache", how, SETTINGS)
    assert (tmp_path / "cache" / "000000.safetensors").read_bytes() == before
    with pytest.raises(OutputError, match="holds a cache of something else"):
        run_method(MODEL, pictures, tmp_path / "cache", replace(how, lora_checkpoint=f"{MODEL}-outlined"), SETTINGS)


def test_loras_that_adapters_cannot_go_on_from(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a.lokr_w1": torch.ones(2, 2)}, tmp_path / "lokr.safetensors")
    with pytest.raises(LoraError, match=r"'a\.lokr_w1' is no key of an adapter"):
        read_adapters(str(tmp_path / "lokr.safetensors"))
    save_file({"a.lora_A.weight": torch.ones(2, 2)}, tmp_path / "half.safetensors")
    with pytest.raises(LoraError, match="has no single rank"):
        read_adapters(str(tmp_path / "half.safetensors"))
    layer = torch.nn.Sequential(LoraLinear(torch.nn.Linear(4, 4), 2, torch.Generator()))
    with pytest.raises(UsageError, match=r"0 has lora_A \(3, 4\), not \(2, 4\)"):
        begin_with(layer, {"0": {"lora_A": torch.ones(3, 4)}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sft:train"}, "is no cache"),
        ({"task": "other"}, "there is no task 'other'; choose of sft,"),
        ({"bundle": "nowhere", "task": DISTILL}, "nowhere"),
        ({"fp8_models": "vae"}, "--fp8_models names 'vae'"),
        ({"preset_lora_path": "zimg-tiny-qwen-bolt"}, "is no LoRA for z-image"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str, pictures: Path, tmp_path: Path) -> None:
    result = None
    try:
        run_method(MODEL, pictures, tmp_path / "a.safetensors", replace(Method(), **changes), SETTINGS)
    except Exception as error:
        result = str(error)
    assert result and message in result
    assert not (tmp_path / "a.safetensors").exists()


def test_caches_of_something_else_are_refused(cache_of: CacheOf, tmp_path: Path) -> None:
    cache, out = cache_of(MODEL, SFT).root, tmp_path / "a.safetensors"
    with pytest.raises(UsageError, match=r"is a cache of sft; give --task sft:train"):
        run_method(MODEL, cache, out, Method("direct_distill:train"), SETTINGS)
    with pytest.raises(UsageError, match="is a cache; give --task sft:train, or a dataset"):
        run_method(MODEL, cache, out, Method("sft"), SETTINGS)
    with pytest.raises(UsageError, match="is a cache of z-image, and the model is of qwen-image"):
        run_method("zimg-tiny-qwen", cache, out, Method("sft:train"), SETTINGS)
    with pytest.raises(UsageError, match="--lora_checkpoint is given, and a whole model is trained"):
        run_method(MODEL, cache, tmp_path / "a", Method("sft:train", lora_checkpoint=BOLT), FULL)
