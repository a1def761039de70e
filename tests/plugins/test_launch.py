"""Launches against an imitation of CUDA's driver: arguments, grids, and what is not there."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import fake_tensorrt
from tests.fake_tensorrt import Machine
from zimgkit.plugins import launch as launching
from zimgkit.plugins import manifest
from zimgkit.plugins.launch import is_available, launch
from zimgkit.plugins.manifest import KernelError, read_manifest

OPERATOR, KERNEL = "qk_norm_rope", "qk_norm_rope.bfloat16"
VALUES: dict[str, Any] = {name: 256 * index for index, name in enumerate(["x", "weight", "cos", "sin", "y"], 1)}
VALUES |= {"tokens": 33, "batch": 2, "heads": 30, "width": 128, "epsilon": 1e-5}
VALUES |= {"x_batch": 33 * 3840, "x_token": 3840, "table_batch": 0, "table_token": 64}
VALUES |= {"y_batch": 40 * 3840, "y_token": 3840}


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    launching._load.cache_clear()
    read_manifest.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return fake_tensorrt.install(monkeypatch)


def queue(capability: tuple[int, int] = (9, 0), name: str = KERNEL, **changes: Any) -> bool:
    return launch(OPERATOR, name, VALUES | changes, device=0, capability=capability, stream=77)


def copy_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the kernels, which stands for the installed ones."""
    for file in (manifest.folder_of(OPERATOR) / "kernels").iterdir():
        (tmp_path / "kernels").mkdir(exist_ok=True)
        (tmp_path / "kernels" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(manifest, "folder_of", lambda operator: tmp_path)
    monkeypatch.setattr(launching, "folder_of", lambda operator: tmp_path)
    read_manifest.cache_clear()
    return tmp_path / "kernels"


def test_arguments_and_grid(machine: Machine) -> None:
    assert queue()
    (made,) = machine.launches
    assert (made.name, made.grid, made.block, made.stream) == ("qk_norm_rope", (33, 2, 4), (128, 1, 1), 77)
    names = [each.name for each in read_manifest(OPERATOR).kernels[KERNEL].parameters]
    assert made.values == (*(VALUES[name] for name in names), 0, 0)
    by_name = dict(zip(names, made.types, strict=False))
    assert by_name["x"] is ctypes.c_void_p
    assert (by_name["tokens"], by_name["epsilon"]) == (ctypes.c_int32, ctypes.c_float)
    assert made.types[-2:] == (ctypes.c_void_p, ctypes.c_void_p)


def test_a_kernel_is_loaded_once(machine: Machine) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: queue(), range(20)))
    assert len(machine.launches) == 20
    assert machine.count("cuLibraryLoadData") == 1
    assert queue(capability=(8, 9))
    assert machine.count("cuLibraryLoadData") == 2


def test_more_shared_memory_is_asked_for(machine: Machine) -> None:
    name = "widened_product.int8.bfloat16"
    kernel = read_manifest("quantized_linear").kernels[name]
    assert kernel.compiled["sm90"].shared > launching.STATIC_SHARED >= kernel.compiled["sm89"].shared
    values = dict.fromkeys((each.name for each in kernel.parameters), 256)
    for capability, asked in (((8, 9), 0), ((9, 0), 1)):
        assert launch("quantized_linear", name, values, device=0, capability=capability, stream=0)
        assert machine.count("cuKernelSetAttribute") == asked
    assert machine.launches[-1].grid == (2, 2, 1)


@pytest.mark.parametrize(("capability", "there"), [((8, 9), True), ((12, 1), True), ((8, 6), False), ((10, 0), False)])
def test_devices(machine: Machine, capability: tuple[int, int], there: bool) -> None:
    """A later device of a generation takes what was compiled for an earlier one, and no other."""
    assert queue(capability) is there
    assert len(machine.launches) == there


@pytest.mark.parametrize(
    "other", [{"x": 8}, {"width": 136}, {"width": 120}, {"x_token": 3841}, {"x_batch": 2**31}, {"name": "qk.int4"}]
)
def test_what_it_was_not_compiled_for_is_left_to_the_caller(machine: Machine, other: dict[str, Any]) -> None:
    assert not queue(**other)
    assert not machine.launches


def test_nothing_is_nothing_to_do(machine: Machine) -> None:
    assert queue(tokens=0)
    assert not machine.launches


def test_a_broken_kernel(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = copy_of(monkeypatch, tmp_path) / "qk_norm_rope.bfloat16.sm90.cubin"
    file.write_bytes(b"not a kernel")
    with pytest.raises(KernelError, match=r"^\S+sm90\.cubin cannot be loaded \(.*CUDA_ERROR_INVALID_IMAGE\): install"):
        queue()
    file.unlink()
    with pytest.raises(KernelError, match=r"^\S+sm90\.cubin cannot be loaded \(.*No such file"):
        queue()
    assert queue((8, 9))


@pytest.mark.parametrize("content", [b"", b"{", b'{"source": 1}'])
def test_a_broken_manifest(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes) -> None:
    (copy_of(monkeypatch, tmp_path) / "manifest.json").write_bytes(content)
    with pytest.raises(KernelError, match=r"^\S+manifest\.json cannot be read \(.*\): install zimgkit again$"):
        queue()


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt.install(monkeypatch, gpus=0)
    assert not is_available()


def test_without_the_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt.install(monkeypatch)
    assert is_available()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert not is_available()
