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
from zimgkit.plugins.manifest import FOLDER, MANIFEST, PTX, folder_of, read_manifest, source_hash

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
TOLERANCE, TRUNCATED = 1e-6, 0.1
"""Relative L2 error: the interpreter truncates to float8, where a device rounds."""
NAMES = {
    "gate_norm_modulate": {"gate_norm_modulate": 3},
    "qk_norm_rope": {"qk_norm_rope": 3, "dense_qk_norm_rope": 3, "joint_dense_qk_norm_rope": 3},
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
        assert all(ROOT.as_posix().encode() not in content for content in files.values())
        counts: dict[str, int] = {}
        for kernel in manifest.kernels.values():
            architectures = {f"sm{architecture}" for architecture in ARCHITECTURES}
            assert kernel.compiled.keys() in ({PTX}, architectures)
            for kind, each in kernel.compiled.items():
                assert files[each.file].startswith(b"//" if kind == PTX else b"\x7fELF")
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


def test_portable_kernels_are_ptx_of_the_parameters_that_are_passed() -> None:
    """Pointers to inputs, integers, a pointer to the output, and no others: the compiler's own would not be passed."""
    portable = {
        name: kernel for name, kernel in read_manifest("qk_norm_rope").kernels.items() if PTX in kernel.compiled
    }
    assert len(portable) == 6
    for kernel in portable.values():
        text = (folder_of("qk_norm_rope") / FOLDER / kernel.compiled[PTX].file).read_text()
        assert ".version 8.7" in text and ".target sm_89" in text
        head, body = text.partition(".visible .entry ")[2].split(")", 1)
        assert head.startswith(f"{kernel.symbol}(")
        types = re.findall(r"\.param \.(\w+) .*?_param_(\d+)", head)
        pointers = {"pointer": "u64", "int32": "u32"}
        assert types == [(pointers[each.type], str(number)) for number, each in enumerate(kernel.parameters)]
        kinds = [each.type for each in kernel.parameters]
        inputs = kinds.index("int32")
        assert kinds == ["pointer"] * inputs + ["int32"] * (len(kinds) - inputs - 1) + ["pointer"]
        assert {int(number) for number in re.findall(r"_param_(\d+)\]", body)} <= set(range(len(kinds)))


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_device_takes_portable_kernels(architecture: int, tmp_path: Path) -> None:
    """By the assembler of CUDA that comes with triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = tools / ("ptxas-blackwell" if architecture >= 100 else "ptxas")
    for kernel in read_manifest("qk_norm_rope").kernels.values():
        if PTX in kernel.compiled:
            file = folder_of("qk_norm_rope") / FOLDER / kernel.compiled[PTX].file
            command = [assembler, f"--gpu-name=sm_{architecture}", file, "-o", tmp_path / "made.cubin"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


@needs_triton
def test_interpreted_portable_kernels_give_what_their_operator_gives() -> None:
    errors = json.loads(program("tests.plugins.interpreted", "portable").splitlines()[-1])
    assert len(errors) == 5 and max(errors) < TOLERANCE, errors


@needs_triton
@pytest.mark.parametrize("operator", OPERATORS)
def test_interpreted_they_give_what_their_operator_gives(operator: str) -> None:
    """All trials, by way of the code that launches them on a device."""
    errors: list[Any] = json.loads(program("tests.plugins.interpreted", operator).splitlines()[-1])
    assert len(errors) >= 2
    for kind, error in errors:
        assert error < (TRUNCATED if kind == "torch.float8_e4m3fn" else TOLERANCE), errors
