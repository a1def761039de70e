"""ONNX Runtime: the default on the CPU, and the CUDA provider where it is present."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zimg.engines.base import Feeds, check_feeds
from zimg.engines.errors import BackendError, BundleError, UsageError

if TYPE_CHECKING:
    from zimg.engines.bundle import Bundle, Component

OUT_OF_MEMORY = ("failed to allocate memory", "out of memory", "bad_alloc", "alloc_failed")
"""What ONNX Runtime, the C++ library and CUDA's libraries say, in lower case."""


def open_engine(bundle: Bundle, component: str, device: str | None = None) -> OnnxRuntimeEngine:
    """Open a component on ONNX Runtime.

    Args:
        bundle: an open bundle.
        component: a component that has a graph.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; by default CUDA where its provider is installed, else the CPU.

    Raises:
        UsageError: no such device.
        BackendError: ONNX Runtime is not installed, has no such provider, or cannot load the graph.
        BundleError: the graph or its weights are broken.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise BackendError("onnxruntime is not installed", "pip install onnxruntime (or onnxruntime-gpu)") from None
    on_cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    kind, index = _parse_device(device or ("cuda" if on_cuda else "cpu"))
    if kind == "cuda" and not on_cuda:
        raise BackendError("this onnxruntime has no CUDA provider", "pip install onnxruntime-gpu, or use --device cpu")
    return OnnxRuntimeEngine(bundle, component, kind, index)


def _parse_device(device: str) -> tuple[str, int]:
    if match := re.fullmatch(r"(cpu|cuda)(?::(\d+))?", device):
        return match[1], int(match[2] or 0)
    raise UsageError(f"ONNX Runtime has no device {device!r}", "choose cpu, cuda or cuda:N")


def _graph(component: Component, kind: str) -> str:
    """The CPU has no bfloat16 kernels: there the graph that computes in float32 runs, on the same weights."""
    if kind == "cpu" and "float32" in component.graphs:
        return component.graphs["float32"]
    return next(iter(component.graphs.values()))


class OnnxRuntimeEngine:
    """One session. Use :func:`open_engine`."""

    def __init__(self, bundle: Bundle, component: str, kind: str, index: int) -> None:
        import onnxruntime as ort

        entry = bundle.component(component)
        if not entry.graphs:
            raise BackendError(f"{component} is a table of tensors and has no graph to run")
        self.name = component
        self.inputs, self.outputs = entry.inputs, entry.outputs
        self._device = (kind, index)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # What fails is raised; its log would be a second message.
        # Its plan of a first run nearly doubles the memory of a second one.
        options.enable_mem_pattern = False
        providers: list[Any] = ["CPUExecutionProvider"]
        if kind == "cuda":
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": index, "cudnn_conv_algo_search": "HEURISTIC"}))
        path = bundle.file(_graph(entry, kind))
        try:
            self._session: Any = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:
            raise _explain(error, f"ONNX Runtime cannot load {path}") from None
        if kind == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise BackendError("ONNX Runtime could not start CUDA", "check the driver, CUDA 12 and cuDNN 9")

    def upload(self, feeds: Mapping[str, NDArray[Any]]) -> Feeds:
        """Copy inputs to the device once; on the CPU they are there already."""
        if self._device[0] == "cpu":
            return dict(feeds)
        import onnxruntime as ort

        return {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), *self._device)
            for name, value in feeds.items()
        }

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        """Run the graph.

        Raises:
            BackendError: an input is missing or misshapen, or memory ran out.
        """
        if self._session is None:
            raise BackendError(f"the engine of {self.name} is closed", "open it again")
        check_feeds(self.name, self.inputs, feeds)
        names = list(self.outputs)
        try:
            if self._device[0] == "cpu":
                return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
            binding = self._session.io_binding()
            for name, value in self.upload({k: v for k, v in feeds.items() if isinstance(v, np.ndarray)}).items():
                binding.bind_ortvalue_input(name, value)
            for name, value in feeds.items():
                if not isinstance(value, np.ndarray):
                    binding.bind_ortvalue_input(name, value)
            for name in names:
                binding.bind_output(name)
            self._session.run_with_iobinding(binding)
            return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))
        except Exception as error:
            raise _explain(error, f"ONNX Runtime failed in {self.name}") from None

    def close(self) -> None:
        """Free the session's memory."""
        self._session = None


def _explain(error: Exception, what: str) -> Exception:
    text = " ".join(str(error).split())
    lower = text.lower()
    if isinstance(error, MemoryError) or any(sign in lower for sign in OUT_OF_MEMORY):
        return BackendError(f"{what}: out of memory", "ask for a smaller picture, or use a bundle of lower precision")
    if "protobuf" in lower or ("external" in lower and "data" in lower):
        return BundleError(f"{what}: {text[:300]}", "copy or build the bundle again")
    return BackendError(f"{what}: {text[:300]}", "try --backend torch, and report this")
