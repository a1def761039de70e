"""The kernels: what is shipped was compiled from their source, and gives what PyTorch's own calls give."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zimgkit.plugins.compile import ARCHITECTURES, OPERATORS
from zimgkit.plugins.manifest import FOLDER, MANIFEST, folder_of, read_manifest, source_hash

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
TOLERANCE, TRUNCATED = 1e-6, 0.1
"""Relative L2 error: the interpreter truncates to float8, where a device rounds."""
NAMES = {
    "gate_norm_modulate": {"gate_norm_modulate": 3},
    "qk_norm_rope": {"qk_norm_rope": 3},
    "quantized_linear": {"round_rows": 1, "rounded_product": 2, "widened_product": 2},
}


def program(*arguments: str) -> str:
    """What a program of its own prints."""
    command = [sys.executable, "-m", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["src", os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("operator", OPERATORS)
class TestShipped:
    def test_they_are_of_this_source(self, operator: str) -> None:
        assert read_manifest(operator).source == source_hash(operator), "run make plugins"

    def test_they_are_all_there_and_small(self, operator: str) -> None:
        manifest, folder = read_manifest(operator), folder_of(operator) / FOLDER
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}
        listed = [each.file for kernel in manifest.kernels.values() for each in kernel.compiled.values()]
        assert sorted(files) == sorted(listed)
        assert sum(map(len, files.values())) < 400_000
        assert all(content[:4] == b"\x7fELF" and ROOT.as_posix().encode() not in content for content in files.values())
        counts: dict[str, int] = {}
        for kernel in manifest.kernels.values():
            assert {f"sm{architecture}" for architecture in ARCHITECTURES} == kernel.compiled.keys()
            counts[kernel.symbol] = counts.get(kernel.symbol, 0) + 1
            assert all(kernel.symbol.encode() in files[each.file] for each in kernel.compiled.values())
            # What blocks of these architectures may have.
            assert all(each.shared <= 99 * 1024 for each in kernel.compiled.values())
        assert counts == NAMES[operator]

    @needs_triton
    def test_they_are_what_the_source_compiles_to(self, operator: str, tmp_path: Path) -> None:
        program("zimgkit.plugins.compile", operator, "--into", str(tmp_path))
        made = {path.name: path.read_bytes() for path in (tmp_path / operator).iterdir()}
        kept = {path.name: path.read_bytes() for path in (folder_of(operator) / FOLDER).iterdir()}
        compilers = [re.search(rb'"compiler": "(.*)"', each[MANIFEST]) for each in (made, kept)]
        if compilers[0] is None or compilers[1] is None or compilers[0][1] != compilers[1][1]:
            pytest.skip(f"the shipped kernels are of {read_manifest(operator).compiler}")
        assert made == kept


@needs_triton
@pytest.mark.parametrize("operator", OPERATORS)
def test_interpreted_they_give_what_their_operator_gives(operator: str) -> None:
    """All trials, by way of the code that launches them on a device."""
    errors: list[Any] = json.loads(program("tests.plugins.interpreted", operator).splitlines()[-1])
    assert len(errors) >= 2
    for kind, error in errors:
        assert error < (TRUNCATED if kind == "torch.float8_e4m3fn" else TOLERANCE), errors
