"""The runtime starts, and draws, without the heavy packages; imports point one way."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "diffusers", "onnx", "onnx_ir", "onnxscript", "huggingface_hub", "modelscope"}
NOT_AT_THE_START = {"onnxruntime", "PIL", "tokenizers", "rich"}
COMMAND = """
import sys
from zimgkit.runtime.commands.cli import main

sys.argv[:1] = ["zimg-run"]
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


def modules_after(code: str, *arguments: object) -> set[str]:
    """The packages and modules that a fresh interpreter has loaded when it has run some code."""
    command = [sys.executable, "-c", code, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.splitlines()[-1].split())
    assert {"sys", "zimgkit"} <= loaded
    return loaded


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["generate", "--help"], ["inspect", "--help"], ["list", "--help"], ["--version"]],
    ids=" ".join,
)
def test_the_command_starts_light(arguments: list[str]) -> None:
    loaded = modules_after(COMMAND, *arguments)
    assert not loaded & (HEAVY | NOT_AT_THE_START | {"numpy"})


@pytest.mark.parametrize(
    "code", ["import zimgkit", "import zimgkit.runtime", "from zimgkit.runtime import Pipeline, Output"]
)
def test_importing_the_runtime_is_light(code: str) -> None:
    loaded = modules_after(f"import sys; {code}; print(*sys.modules, file=sys.stderr)")
    assert not loaded & (HEAVY | NOT_AT_THE_START)


def test_every_module_of_the_runtime_is_light() -> None:
    """But for what is PyTorch's or Triton's, which says so in its name, and what runs within Ray."""
    code = """if True:
        import importlib, pkgutil, sys
        import zimgkit.engines, zimgkit.plugins, zimgkit.runtime
        for package in (zimgkit.engines, zimgkit.plugins, zimgkit.runtime):
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                heavy = module.name.startswith(("zimgkit.engines.torch.", "zimgkit.runtime.serve.ray_app"))
                if not heavy and not module.name.endswith((".torch", ".pytorch", ".triton")):
                    importlib.import_module(module.name)
        print(*sys.modules, file=sys.stderr)
    """
    loaded = modules_after(code)
    assert {"zimgkit.runtime.pipeline", "zimgkit.runtime.commands.cli", "zimgkit.engines.onnxruntime.engine"} <= loaded
    assert not loaded & (HEAVY | NOT_AT_THE_START)


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_a_picture_is_drawn_without_them(bundle_of: Callable[..., Path], tmp_path: Path, family: str) -> None:
    out = tmp_path / "out.png"
    arguments = ["--bundle", bundle_of(family), "--prompt", "a cat", "--height", 32, "--width", 32, "--output", out]
    loaded = modules_after(COMMAND, "generate", *arguments, "--num-inference-steps", 2, "--negative-prompt", "bad")
    assert {"onnxruntime", "tokenizers", "PIL"} <= loaded
    assert not loaded & HEAVY
    assert out.stat().st_size > 100


def test_the_script_is_installed() -> None:
    script = Path(sysconfig.get_path("scripts"), "zimg-run")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("Usage: zimg-run [OPTIONS] COMMAND [ARGS]...")
    assert done.stderr == ""


def test_imports_point_one_way(tmp_path: Path) -> None:
    """export -> runtime -> engines -> plugins, and the contract that keeps the heavy packages out."""
    script = Path(sysconfig.get_path("scripts"), "lint-imports")
    command = [script, "--config", ROOT / "pyproject.toml", "--cache-dir", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout
