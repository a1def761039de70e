from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import utils
from accelerate.state import AcceleratorState, PartialState

from zimgkit.engines.errors import BackendError, UsageError
from zimgkit.training.devices import accelerator_of, peak_memory


@pytest.fixture(autouse=True)
def _no_state() -> Iterator[None]:
    """Accelerate keeps what it chose first for the whole process."""
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, PartialState):
        state._reset_state()


@pytest.mark.parametrize(
    ("device", "report_to", "error", "message"),
    [
        ("tpu", "", UsageError, "no device 'tpu' to train on; choose of cpu, cuda, npu"),
        ("npu", "", BackendError, "torch_npu is not installed; pip install torch_npu"),
        ("", "wandb", UsageError, "nothing reports to 'wandb'; choose of tensorboard"),
        ("", "tensorboard", BackendError, "tensorboard is not installed; pip install tensorboard"),
    ],
)
def test_what_is_not_there(
    device: str, report_to: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zimgkit.training.devices.find_spec", lambda name: None)
    with pytest.raises(error, match=message):
        accelerator_of(device, "no", report_to, tmp_path)


def test_the_cpu(tmp_path: Path) -> None:
    accelerator = accelerator_of("cpu", "no", "", tmp_path)
    assert accelerator.device == torch.device("cpu")
    assert peak_memory(accelerator.device).endswith(("GB", "MB"))


def test_an_npu_that_is_imitated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of torch_npu and accelerate; nothing runs there."""
    monkeypatch.setattr(utils, "is_npu_available", lambda: True)
    made: dict[str, Any] = {}

    class Imitation:
        device = torch.device("cpu")

        def __init__(self, **options: Any) -> None:
            made.update(options)

    monkeypatch.setattr("accelerate.Accelerator", Imitation)
    with pytest.raises(BackendError, match="accelerate runs on cpu; hide that device to train on npu"):
        accelerator_of("npu", "bf16", "", tmp_path)
    assert made["cpu"] is False and made["mixed_precision"] == "bf16"
    monkeypatch.setattr(Imitation, "device", SimpleNamespace(type="npu"))
    npu = ModuleType("torch.npu")
    npu.max_memory_allocated = lambda: 3_000_000_000  # type: ignore[attr-defined]
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    assert peak_memory(accelerator_of("npu", "no", "", tmp_path).device) == "3.0 GB"


def test_what_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An imitation of the tracker's own package, as accelerate asks for it."""
    told: list[tuple[str, dict[str, float], int]] = []

    class Tracker:
        def __init__(self, **options: Any) -> None:
            told.append(("begun", {}, 0))

        def init_trackers(self, name: str) -> None:
            told.append((name, {}, 0))

        device = torch.device("cpu")

    package = ModuleType("tensorboard")
    package.__spec__ = ModuleSpec("tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard", package)
    monkeypatch.setattr("accelerate.Accelerator", Tracker)
    accelerator_of("", "no", "tensorboard", tmp_path)
    assert [entry[0] for entry in told] == ["begun", "tensorboard"]
