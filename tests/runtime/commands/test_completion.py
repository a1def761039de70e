"""What a shell is told to complete, and that bash does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zimgkit.runtime import demo_models

PROGRAM = f"""#!{sys.executable}
from zimgkit.runtime.commands.cli import main
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the console script, and a bundle in a folder."""
    folder = tmp_path_factory.mktemp("complete")
    (folder / "zimg-run").write_text(PROGRAM)
    (folder / "zimg-run").chmod(0o755)
    (folder / "mine").mkdir()
    shutil.copy(demo_models.locate("zimg-tiny-z") / "bundle.json", folder / "mine")
    return folder


def run(folder: Path, *command: str, **variables: str) -> list[str]:
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    environment = os.environ | {"PATH": path} | variables
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ([""], ["generate", "inspect", "list", "preprocess", "serve", "sheet"]),
        (["generate", "--nu"], ["--num-images", "--num-inference-steps"]),
        (["generate", "--backend", "ten"], ["tensorrt", "tensorrt-rtx"]),
        (["inspect", ""], [*demo_models.ALL, "mine"]),
        (["generate", "--bundle", "mi"], ["mine"]),
        (["sheet", "p.txt", "--bundle", "zimg-tiny-q"], ["zimg-tiny-qwen", "zimg-tiny-qwen-edit"]),
    ],
)
def test_bash_completes(folder: Path, typed: list[str], expected: list[str]) -> None:
    script = """
        eval "$(_ZIMG_RUN_COMPLETE=bash_source zimg-run)"
        COMP_WORDS=(zimg-run "$@"); COMP_CWORD=$#
        compopt() { :; }
        _zimg_run_completion zimg-run
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    assert sorted(run(folder, "bash", "-c", script, "bash", *typed)) == sorted(expected)


def test_folders_are_completed_where_no_bundle_fits(folder: Path) -> None:
    words = {"COMP_WORDS": "zimg-run inspect /tm", "COMP_CWORD": "2", "_ZIMG_RUN_COMPLETE": "bash_complete"}
    assert run(folder, "zimg-run", **words) == ["dir,/tm"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_are_told_how(folder: Path, shell: str) -> None:
    source = "\n".join(run(folder, "zimg-run", _ZIMG_RUN_COMPLETE=f"{shell}_source"))
    assert f"_ZIMG_RUN_COMPLETE={shell}_complete" in source and "zimg-run" in source
