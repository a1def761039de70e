from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zimgkit.engines.errors import CheckpointError, OutputError, UsageError
from zimgkit.training.loop import Settings, TrainingError, generator_of, rate_factor, train

SETTINGS = Settings(steps=12, batch_size=8, learning_rate=0.05, warmup=2, ema=0.9, save_every=4)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(3, 1)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.linear(x) * self.frozen - y).square().mean()


class Task:
    name = "line"
    hidden: tuple[str, ...] = ()

    def __init__(self, stop: int = 1000, scale: float = 1.0) -> None:
        self.module = Line()
        self.stop, self.scale, self.batches = stop, scale, 0

    def batch(self, generator: torch.Generator, batch_size: int) -> dict[str, Any]:
        self.batches += 1
        if self.batches > self.stop:
            raise KeyboardInterrupt
        x = torch.randn(batch_size, 3, generator=generator)
        return {"x": x, "y": self.scale * x.sum(dim=1, keepdim=True)}

    def preview(self, path: Path) -> None:
        Image.new("RGB", (1, 1)).save(path)


def test_it_learns_and_leaves_a_curve_and_a_preview(tmp_path: Path) -> None:
    lines, task = [], Task()
    settings = replace(SETTINGS, steps=200, save_every=100)
    average = train(task, tmp_path, settings, log=lines.append)
    assert torch.allclose(average["linear.weight"], torch.ones(1, 3), atol=0.05)
    assert torch.equal(task.module.linear.weight, average["linear.weight"])
    assert set(average) == {"linear.weight", "linear.bias"}
    assert Image.open(tmp_path / "loss.png").size == (960, 480)
    assert (tmp_path / "preview.png").exists()
    assert not list(tmp_path.glob("*.part"))
    assert lines[0].startswith("line: step 100 of 200, loss ")


def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    unbroken = train(Task(), tmp_path / "a", SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        train(Task(stop=6), tmp_path / "b", SETTINGS)
    task = Task()
    resumed = train(task, tmp_path / "b", SETTINGS, resume=True)
    assert task.batches == 8  # Steps 5 to 12: the state was saved after step 4.
    first, second = (load_file(tmp_path / run / "state.safetensors") for run in "ab")
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    for name, value in unbroken.items():
        assert torch.equal(value, resumed[name]), name


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    done = train(Task(), tmp_path, SETTINGS)
    task = Task()
    again = train(task, tmp_path, SETTINGS, resume=True)
    assert task.batches == 0
    assert all(torch.equal(done[name], again[name]) for name in done)


def test_the_average_is_that_of_the_weights(tmp_path: Path) -> None:
    """Against torch's own averaged model, of the weights that runs of rising length end with."""
    settings = replace(SETTINGS, ema=0.5, steps=3, save_every=1)
    weights = []
    for stop in (1, 2, 3):
        run = tmp_path / str(stop)
        if stop < 3:
            with pytest.raises(KeyboardInterrupt):
                train(Task(stop=stop), run, settings)
        else:
            train(Task(), run, settings)
        weights.append(load_file(run / "state.safetensors")["weights.linear.weight"])
    expected = Line().linear.weight.detach()
    for step, value in enumerate(weights):
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * value
    found = load_file(tmp_path / "3" / "state.safetensors")["ema.linear.weight"]
    torch.testing.assert_close(found, expected)


def test_the_rate_rises_and_falls() -> None:
    settings = replace(SETTINGS, steps=100, warmup=10)
    rates = [rate_factor(settings, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1
    assert rates[70] == 1
    assert rates[85] == pytest.approx(0.51)
    assert rates[100] == pytest.approx(0.02)


@pytest.mark.parametrize(("restart", "steps"), [(100, 160), (40, 100), (1, 50), (99, 100)])
def test_after_a_restart_the_rate_is_that_of_another_run(restart: int, steps: int) -> None:
    settings = replace(SETTINGS, steps=steps, restart=restart, warmup=0)
    rates = [rate_factor(settings, step) for step in range(steps + 1)]
    first, second = (replace(settings, steps=count, restart=0) for count in (restart, steps - restart))
    assert rates[:restart] == [rate_factor(first, step) for step in range(restart)]
    assert rates[restart:] == [rate_factor(second, step) for step in range(steps - restart + 1)]


@pytest.mark.parametrize("restart", [100, 101, 5000])
def test_a_restart_at_the_end_or_past_it_is_none(restart: int) -> None:
    settings = replace(SETTINGS, steps=100)
    for step in range(100):
        assert rate_factor(replace(settings, restart=restart), step) == rate_factor(settings, step)


def test_generators_depend_on_every_number() -> None:
    draws = {
        tuple(torch.rand(2, generator=generator_of(*n)).tolist()) for n in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    }
    assert len(draws) == 4
    assert torch.equal(torch.rand(3, generator=generator_of(5, 6)), torch.rand(3, generator=generator_of(5, 6)))


def test_compiled_networks_learn_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From batches of other sizes too; and a run goes on without compiling, or with it."""

    class Growing(Task):
        def batch(self, generator: torch.Generator, batch_size: int) -> dict[str, Any]:
            return super().batch(generator, batch_size + self.batches)

    expected = train(Growing(), tmp_path / "eager", SETTINGS)
    compiling = replace(SETTINGS, compile=True)
    task = Growing()
    found = train(task, tmp_path / "compiled", compiling)
    assert found.keys() == expected.keys() == dict(Line().named_parameters()).keys() - {"frozen"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert torch.equal(
        train(Growing(), tmp_path / "compiled", SETTINGS, resume=True)["linear.bias"], found["linear.bias"]
    )
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(UsageError, match="--compile needs a C\\+\\+ compiler, and there is no no-compiler"):
        train(Task(), tmp_path / "none", compiling)


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train(Task(), tmp_path, SETTINGS)
    with pytest.raises(OutputError, match="holds a run already; add --resume"):
        train(Task(), tmp_path, SETTINGS)


def test_a_run_goes_on_for_longer_until_its_rate_falls(tmp_path: Path) -> None:
    """As if the longer one had been asked for at first."""
    longer = replace(SETTINGS, steps=40, save_every=1)
    whole = train(Task(), tmp_path / "whole", longer)
    for stop in (10, 18):
        with pytest.raises(KeyboardInterrupt):
            train(Task(stop=stop), tmp_path / str(stop), replace(longer, steps=20))
    resumed = train(Task(), tmp_path / "10", longer, resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    with pytest.raises(CheckpointError, match=r"its steps is 20, not 40; .* --restart 20 goes on from there"):
        train(Task(), tmp_path / "18", longer, resume=True)


def test_a_run_does_not_go_back(tmp_path: Path) -> None:
    """Within the warmup the rates of any number of steps are the same."""
    train(Task(), tmp_path, replace(SETTINGS, warmup=100))
    with pytest.raises(CheckpointError, match="its steps is 12, not 8"):
        train(Task(), tmp_path, replace(SETTINGS, warmup=100, steps=8), resume=True)


def test_a_finished_run_goes_on_with_a_restart(tmp_path: Path) -> None:
    """As if the restart had been asked for at first; and only from where its rate had fallen."""
    longer = replace(SETTINGS, steps=20, restart=12)
    whole = train(Task(), tmp_path / "whole", longer)
    train(Task(), tmp_path / "first", SETTINGS)
    with pytest.raises(CheckpointError, match="its steps is 12, not 20"):
        train(Task(), tmp_path / "first", replace(longer, restart=11), resume=True)
    task = Task()
    resumed = train(task, tmp_path / "first", longer, resume=True)
    assert task.batches == 8
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    with pytest.raises(CheckpointError, match=r"its steps is 20, not 30; .* in another folder$"):
        train(Task(), tmp_path / "first", replace(SETTINGS, steps=30, restart=20), resume=True)


@pytest.mark.parametrize("steps", ["many", None, [12]])
def test_a_state_whose_steps_are_no_number(tmp_path: Path, steps: Any) -> None:
    train(Task(), tmp_path, SETTINGS)
    state = tmp_path / "state.safetensors"
    with safe_open(state, "pt") as opened:
        run = json.loads(opened.metadata()["run"])
    save_file(load_file(state), state, {"run": json.dumps({**run, "steps": steps})})
    with pytest.raises(CheckpointError, match="cannot be resumed: its steps is"):
        train(Task(), tmp_path, SETTINGS, resume=True)


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run to resume; leave --resume out"):
        train(Task(), tmp_path, SETTINGS, resume=True)
    train(Task(), tmp_path, SETTINGS, about={"data": "a"})
    state = tmp_path / "state.safetensors"
    with pytest.raises(CheckpointError, match="its steps is 12, not 13"):
        train(Task(), tmp_path, replace(SETTINGS, steps=13), about={"data": "a"}, resume=True)
    with pytest.raises(CheckpointError, match="its data is 'a', not 'b'"):
        train(Task(), tmp_path, SETTINGS, about={"data": "b"}, resume=True)
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"state.safetensors cannot be read .*remove the folder"):
        train(Task(), tmp_path, SETTINGS, about={"data": "a"}, resume=True)
    save_file({"x": torch.ones(1)}, state)
    with pytest.raises(CheckpointError, match="is no state of a run"):
        train(Task(), tmp_path, SETTINGS, about={"data": "a"}, resume=True)


def test_a_state_of_another_model(tmp_path: Path) -> None:
    train(Task(), tmp_path, SETTINGS)
    other = Task()
    other.module.linear = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match="does not hold the tensors of this model"):
        train(other, tmp_path, SETTINGS, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"restart": -1}, "restart is -1"),
    ],
)
def test_senseless_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SETTINGS, **change)


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the loss of step 1 is inf; lower --learning-rate"):
        train(Task(scale=1e30), tmp_path, SETTINGS)
    assert not (tmp_path / "state.safetensors").exists()


def test_what_is_accumulated_is_one_step_of_a_larger_batch(tmp_path: Path) -> None:
    whole = train(Task(), tmp_path / "whole", SETTINGS)
    parts = replace(SETTINGS, batch_size=2, gradient_accumulation_steps=4)
    accumulated = train(Task(), tmp_path / "parts", parts)
    for name, value in whole.items():
        torch.testing.assert_close(accumulated[name], value)
    first, second = (load_file(tmp_path / run / "state.safetensors")["losses"] for run in ("whole", "parts"))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)
    with pytest.raises(UsageError, match="gradient_accumulation_steps is 0"):
        train(Task(), tmp_path / "none", replace(SETTINGS, gradient_accumulation_steps=0))


def test_a_state_from_before_a_setting_was_there(tmp_path: Path) -> None:
    train(Task(), tmp_path, SETTINGS)
    state = tmp_path / "state.safetensors"
    with safe_open(state, "pt") as opened:
        run = json.loads(opened.metadata()["run"])
    assert run.keys().isdisjoint(("device", "report_to"))
    del run["gradient_accumulation_steps"]
    save_file(load_file(state), state, {"run": json.dumps(run)})
    train(Task(), tmp_path, SETTINGS, resume=True)
    with pytest.raises(CheckpointError, match="its gradient_accumulation_steps is 1, not 2"):
        train(Task(), tmp_path, replace(SETTINGS, gradient_accumulation_steps=2), resume=True)


def test_a_line_says_how_long_it_takes_and_how_much_memory(tmp_path: Path) -> None:
    lines: list[str] = []
    train(Task(), tmp_path, SETTINGS, log=lines.append)
    assert re.fullmatch(r"line: step 12 of 12, loss \d\.\d{5}, [\d.]+/s, 0:00:00 left, [\d.]+ [MG]B", lines[-1]), lines


def test_two_processes_train_as_one_does_on_both_batches(tmp_path: Path) -> None:
    class Both(Task):
        def batch(self, generator: torch.Generator, batch_size: int) -> dict[str, Any]:
            step, self.batches = self.batches, self.batches + 1
            parts = [Task().batch(generator_of(SETTINGS.seed, step, rank), batch_size // 2) for rank in (0, 1)]
            return {name: torch.cat([part[name] for part in parts]) for name in ("x", "y")}

    expected = train(Both(), tmp_path / "one", replace(SETTINGS, batch_size=2 * SETTINGS.batch_size))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.two_processes", str(tmp_path / "two")]
    started = [subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    assert [process.wait(120) for process in started] == [0, 0]
    found = load_file(tmp_path / "two" / "state.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[f"ema.{name}"], value)
    losses = load_file(tmp_path / "one" / "state.safetensors")["losses"]
    torch.testing.assert_close(found["losses"], losses, rtol=1e-6, atol=0)
