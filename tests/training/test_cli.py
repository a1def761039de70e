from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import toy


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zimgkit.training", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_help_names_the_commands() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("tokenizer", "vae", "diffusion", "lora", "demo"):
        assert f"\n  {command} " in done.stdout


def test_errors_are_one_line(tmp_path: Path) -> None:
    data = toy.dataset(tmp_path / "data")
    (data / "metadata.csv").write_text("image,prompt\n0.png,\n")
    done = run("tokenizer", "--family", "z-image", data, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("zimg-training: error: ")
    assert "line 2: the caption of 0.png is empty" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["vae", "x"], ["demo", "y"], ["tokenizer", "--family", "flux", "a", "b"]])
def test_wrong_usage(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
