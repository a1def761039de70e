"""``auto``: which backend runs a bundle where nobody names one, and why."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zimgkit.engines.cpu import BFLOAT16, VNNI, cpu_flags, lacks_avx2

if TYPE_CHECKING:
    from zimgkit.engines.bundle import Manifest

AUTO = "auto"
PACKAGES = ("openvino", "onnx", "tensorrt", "tensorrt_rtx", "cuda", "onnxruntime_ep_nv_tensorrt_rtx")
COMPILED = {"tensorrt": "cuda", "tensorrt-rtx": "onnxruntime_ep_nv_tensorrt_rtx"}
"""A backend of compiled engines -> the package that runs them, beside their compiler."""
CUDA_PROVIDER = "capi/libonnxruntime_providers_cuda.so"
GAINS = {
    "bfloat16": BFLOAT16,
    "int8": VNNI,
    "int8-dynamic": VNNI,
    "int8-weights": VNNI,
    "int4-weights": VNNI,
}
"""What OpenVINO computes a bundle in faster than ONNX Runtime -> any of the CPU's flags with which it does so."""

SMALL = 100_000_000
"""Bytes of weights. Of fewer, opening takes OpenVINO longer than it saves in the pictures of one command."""


class Machine(NamedTuple):
    """What a choice depends on, beside the bundle."""

    packages: frozenset[str]
    """Those of :data:`PACKAGES` that are installed."""
    flags: frozenset[str]
    """Of the CPU."""
    nvidia: bool = False
    """Whether there is an NVIDIA GPU."""
    cuda_provider: bool = False
    """Whether ONNX Runtime is the build that runs on it."""


class Choice(NamedTuple):
    """A backend, and why it was chosen: empty where it was named."""

    backend: str
    reason: str = ""
    is_plain: bool = False
    """Whether it is what anybody expects, and not worth a line to whoever draws a picture."""

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


def this_machine() -> Machine:
    """Look at this machine; nothing is imported."""
    found = frozenset(name for name in PACKAGES if find_spec(name))
    nvidia = has_nvidia_gpu()
    return Machine(found, cpu_flags(), nvidia, nvidia and has_cuda_provider())


def has_nvidia_gpu() -> bool:
    """Whether there is an NVIDIA GPU, as far as its driver's file tells."""
    return Path("/dev/nvidiactl").exists()


def has_cuda_provider() -> bool:
    """Whether the ONNX Runtime that is installed is the build for NVIDIA GPUs."""
    runtime = find_spec("onnxruntime")
    return bool(runtime and runtime.origin and (Path(runtime.origin).parent / CUDA_PROVIDER).exists())


def choose_backend(
    manifest: Manifest, device: str | Mapping[str, str] | None = None, machine: Machine | None = None
) -> Choice:
    """Choose for a bundle on a machine.

    Engines compiled from it for a GPU that is there come first, then ONNX Runtime's own provider for that; on a CPU
    OpenVINO, where it is installed and computes the bundle's precision faster, else ONNX Runtime.

    Args:
        manifest: of the bundle.
        device: as the user named it, if at all.
        machine: this one when not given.
    """
    machine = machine or this_machine()
    devices = device.values() if isinstance(device, Mapping) else [device or ""]
    named = sorted({name.partition(":")[0] for name in devices})
    if other := [name for name in named if name in ("gpu", "npu")]:
        return Choice("openvino", f"it has the device {other[0]}")
    if "cuda" in named or (named == [""] and machine.nvidia):
        for engine in manifest.engines:
            if {engine.compiler, COMPILED.get(engine.backend, "")} <= machine.packages:
                return Choice(engine.backend, "the bundle has engines that were compiled for it")
    for kind in ("cuda", "cann"):
        if kind in named:
            return Choice("onnxruntime", f"the device is {kind}")
    if named == [""] and machine.cuda_provider:
        return Choice("onnxruntime", "it runs on the NVIDIA GPU of this machine")
    precision = manifest.quantized or manifest.precision
    whole = [entry for name, entry in manifest.components.items() if not manifest.is_piece(name)]
    return _choose_for_cpu(precision, sum(entry.weight_bytes for entry in whole), machine)


def _choose_for_cpu(precision: str, weight_bytes: int, machine: Machine) -> Choice:
    wanted = GAINS.get(precision)
    if not wanted:
        return Choice("onnxruntime", f"nothing else is faster in {precision}", is_plain=True)
    if weight_bytes < SMALL:
        return Choice("onnxruntime", "so small a model is opened fastest", is_plain=True)
    products = next((flag for flag in wanted if flag in machine.flags), None)
    if products is None or lacks_avx2(machine.flags):
        return Choice("onnxruntime", f"this CPU has no {' or '.join(wanted)} for {precision}")
    if missing := [name for name in ("openvino", "onnx") if name not in machine.packages]:
        return Choice("onnxruntime", f"openvino would be faster in {precision}, and {missing[0]} is not installed")
    return Choice("openvino", f"it computes {precision} with {products} of this CPU")
