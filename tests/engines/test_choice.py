"""Which backend ``auto`` takes: a table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.handmade import manifest
from zimgkit.engines import choice
from zimgkit.engines.base import BACKENDS
from zimgkit.engines.bundle import CompiledEngine, Component, Quantization
from zimgkit.engines.choice import Machine, choose_backend, this_machine

LARGE = {"denoiser": Component((), weight_bytes=10**9)}
HERE = frozenset({"openvino", "onnx"})
ZEN5 = frozenset({"avx2", "avx512_vnni", "avx512_bf16"})
AVX2 = frozenset({"avx2"})
TENSORRT = CompiledEngine("denoiser", "a", "tensorrt", "tensorrt", "11", "sm90", "", ())
RTX = CompiledEngine("denoiser", "a", "tensorrt-rtx", "tensorrt_rtx", "1", "sm89", "", ())
CARD = Machine(frozenset({"tensorrt", "cuda"}) | HERE, ZEN5, nvidia=True)

TABLE: list[tuple[str, Any, Any, Machine, str, str]] = [
    # precision, engines, device, machine -> backend, a part of the reason
    ("float32", (), None, Machine(HERE, ZEN5), "onnxruntime", "nothing else is faster in float32"),
    ("fp8", (), None, Machine(HERE, ZEN5), "onnxruntime", "nothing else is faster in fp8"),
    ("bfloat16", (), None, Machine(HERE, ZEN5), "openvino", "bfloat16 with avx512_bf16"),
    ("bfloat16", (), "cpu", Machine(HERE, ZEN5), "openvino", "bfloat16 with avx512_bf16"),
    ("bfloat16", (), {"denoiser": "cpu"}, Machine(HERE, ZEN5), "openvino", "bfloat16 with avx512_bf16"),
    ("bfloat16", (), None, Machine(HERE, AVX2), "onnxruntime", "no avx512_bf16 or amx_bf16 for bfloat16"),
    ("bfloat16", (), None, Machine(HERE, AVX2 | {"amx_bf16"}), "openvino", "amx_bf16"),
    ("bfloat16", (), None, Machine(HERE, frozenset()), "onnxruntime", "no avx512_bf16"),
    ("bfloat16", (), None, Machine(frozenset(), ZEN5), "onnxruntime", "openvino is not installed"),
    ("bfloat16", (), None, Machine(frozenset({"openvino"}), ZEN5), "onnxruntime", "onnx is not installed"),
    ("int8", (), None, Machine(HERE, ZEN5), "openvino", "int8 with avx512_vnni"),
    ("int8", (), None, Machine(HERE, AVX2), "onnxruntime", "no avx512_vnni or avx_vnni"),
    ("int8-weights", (), None, Machine(HERE, AVX2 | {"avx_vnni"}), "openvino", "avx_vnni"),
    ("int4-weights", (), None, Machine(HERE, ZEN5), "openvino", "int4-weights with avx512_vnni"),
    ("bfloat16", (), "gpu:1", Machine(HERE, AVX2), "openvino", "it has the device gpu"),
    ("bfloat16", (), {"denoiser": "npu"}, Machine(frozenset(), AVX2), "openvino", "it has the device npu"),
    ("bfloat16", (), "cuda", Machine(HERE, ZEN5), "onnxruntime", "the device is cuda"),
    ("bfloat16", (), "cann:1", Machine(HERE, ZEN5), "onnxruntime", "the device is cann"),
    ("bfloat16", (TENSORRT,), None, CARD, "tensorrt", "compiled for it"),
    ("bfloat16", (TENSORRT,), "cuda:1", CARD, "tensorrt", "compiled for it"),
    ("bfloat16", (TENSORRT,), "cpu", CARD, "openvino", "avx512_bf16"),
    ("bfloat16", (TENSORRT,), None, CARD._replace(nvidia=False), "openvino", "avx512_bf16"),
    ("bfloat16", (RTX,), None, CARD, "openvino", "avx512_bf16"),
    ("bfloat16", (), None, CARD._replace(cuda_provider=True), "onnxruntime", "NVIDIA GPU"),
    ("bfloat16", (RTX, TENSORRT), None, CARD._replace(cuda_provider=True), "tensorrt", "compiled for it"),
]


@pytest.mark.parametrize(("precision", "engines", "device", "machine", "backend", "reason"), TABLE)
def test_the_table(precision, engines, device, machine, backend, reason):
    changes: dict[str, Any] = {"precision": precision}
    if precision not in ("float32", "bfloat16"):
        changes = {"precision": "bfloat16", "quantization": Quantization(precision)}
    found = choose_backend(manifest(engines=engines, components=LARGE, **changes), device, machine)
    assert found.backend == backend
    assert reason in found.reason
    assert found.backend in BACKENDS


def test_a_small_model_is_opened_by_what_opens_it_first():
    components = {"denoiser": Component((), weight_bytes=10**7)}
    found = choose_backend(manifest(precision="bfloat16", components=components), None, Machine(HERE, ZEN5))
    assert found == ("onnxruntime", "so small a model is opened fastest", True)


def test_a_cpu_without_avx2(monkeypatch):
    monkeypatch.setattr(choice, "lacks_avx2", lambda flags: True)
    found = choose_backend(manifest(precision="bfloat16", components=LARGE), None, Machine(HERE, ZEN5))
    assert found.backend == "onnxruntime"


def test_looking_at_this_machine_imports_nothing():
    code = """if True:
        import sys
        from zimgkit.engines.choice import this_machine
        this_machine()
        print(*sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"openvino", "onnx", "onnxruntime", "tensorrt", "numpy"} & set(done.stdout.split())


def test_the_flags_are_those_of_the_kernel():
    shown = Path("/proc/cpuinfo").read_text()
    flags = this_machine().flags
    assert all(f" {flag}" in shown for flag in flags)
    assert bool(flags) == ("\nflags" in shown)
