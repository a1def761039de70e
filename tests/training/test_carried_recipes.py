"""The commands that make what zimgkit carries: all of it is there, and every option exists."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from zimgkit.runtime import demo_models
from zimgkit.training.cli import cli
from zimgkit.training.world.__main__ import cli as world

ROOT = Path(__file__).parents[2]
FILES = [*demo_models.ALL, *(f"{name}.safetensors" for name in demo_models.LORAS)]


def recipe(name: str, out: Path) -> Iterator[list[str]]:
    """What would be typed: the arguments of each command, without Python's."""
    command = ["make", "--dry-run", "--no-print-directory", "-f", "training/carried.mk", f"OUT={out}", f"{out / name}"]
    # `make test` tells the makes below it how deep they are and what it was given.
    outside = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    shown = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout
    for line in shown.replace("\\\n", " ").splitlines():
        _, dash_m, module, *arguments = shlex.split(line)
        assert dash_m == "-m"
        yield [module, *arguments]


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize("name", FILES)
def test_each_has_a_recipe_whose_commands_exist(name: str, tmp_path: Path) -> None:
    lines = [*recipe(name, tmp_path)]
    for module, *arguments in lines:
        if module == "zimgkit.training.world":
            assert world.make_context("world", arguments).params["count"] > 0
            continue
        assert module == "zimgkit.training"
        task, command, rest = cli.resolve_command(click.Context(cli), arguments)
        assert command is not None
        assert command.make_context(task, rest).params
    assert f"{tmp_path / name}" in lines[-1]
