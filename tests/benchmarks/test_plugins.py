from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "plugins.py"


def test_values_on_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At tiny size, against numpy; that the rest is untested is said."""
    spec = importlib.util.spec_from_file_location("plugins_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["plugins.py", "--device", "cpu", "--skip-block"])
    assert module.main() == 0
    out = capsys.readouterr().out
    assert out.count("ok  ") == len(module.NAMES)
    assert "untested" in out
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["plugins.py"])
        with pytest.raises(SystemExit, match="finds no GPU: --device cpu checks the values"):
            module.main()
