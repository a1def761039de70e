"""CUDA's runtime, as far as a backend needs it: devices, memory, copies, streams and graphs of recorded work.

A thin layer over ``cuda.bindings.runtime`` (https://nvidia.github.io/cuda-python/cuda-bindings), which is imported when
it is first called.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import BackendError, OutOfMemoryError, install

ELSEWHERE = "use --backend onnxruntime --device cpu"
SMALLER = (
    "ask for a smaller picture, free the device's memory, compile with a --weight-streaming-budget and run with "
    "--memory, or use a bundle of lower precision"
)


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise BackendError("CUDA's Python bindings are not installed", install("tensorrt")) from None
    return runtime


def _call(name: str, *arguments: Any) -> Any:
    """Call a function of the runtime; what it gives beside its status."""
    runtime = _runtime()
    status, *values = getattr(runtime, name)(*arguments)
    if int(status):
        _raise(runtime, name, status)
    return values[0] if len(values) == 1 else tuple(values)


def _raise(runtime: Any, name: str, status: Any) -> None:
    runtime.cudaGetLastError()  # Else it is reported again by a later call.
    text = _say(runtime, status)
    if int(status) == int(runtime.cudaError_t.cudaErrorMemoryAllocation):
        raise OutOfMemoryError(f"{name}: {text}", SMALLER)
    raise BackendError(f"{name} failed: {text}", "start the program again, and report this if it stays")


def _say(runtime: Any, status: Any) -> str:
    return str(runtime.cudaGetErrorString(status)[1].decode())


@dataclass(frozen=True)
class Device:
    """A GPU that is there and can be used."""

    index: int
    architecture: str
    """Its compute capability, such as ``"sm90"``."""
    name: str
    """As the vendor calls it."""


def open_device(index: int = 0) -> Device:
    """Find a GPU and make it the current one of this thread.

    Args:
        index: which, from 0, among those that ``CUDA_VISIBLE_DEVICES`` leaves.

    Raises:
        BackendError: the bindings, the driver or the GPU is missing, or the driver is too old.
    """
    runtime = _runtime()
    driver = _call("cudaDriverGetVersion")
    if driver == 0:
        raise BackendError("there is no NVIDIA driver", f"install one, or {ELSEWHERE}")
    status, count = runtime.cudaGetDeviceCount()
    if int(status) == int(runtime.cudaError_t.cudaErrorInsufficientDriver):
        needed = _call("cudaRuntimeGetVersion")
        raise BackendError(
            f"the NVIDIA driver serves CUDA up to {_version(driver)}, and cuda-bindings is of {_version(needed)}",
            f"update the driver, or install TensorRT and cuda-bindings for CUDA {driver // 1000}",
        )
    if int(status) == int(runtime.cudaError_t.cudaErrorNoDevice) or (not int(status) and count == 0):
        raise BackendError("there is no NVIDIA GPU", f"check nvidia-smi and CUDA_VISIBLE_DEVICES, or {ELSEWHERE}")
    if int(status):
        raise BackendError(f"CUDA does not start: {_say(runtime, status)}", f"check nvidia-smi, or {ELSEWHERE}")
    if index >= count:
        known = ", ".join(f"cuda:{known}" for known in range(count))
        raise BackendError(f"there is no device cuda:{index}", f"choose one of {known}")
    use(index)
    kinds = runtime.cudaDeviceAttr
    major = _call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMajor, index)
    minor = _call("cudaDeviceGetAttribute", kinds.cudaDevAttrComputeCapabilityMinor, index)
    name = _call("cudaGetDeviceProperties", index).name.decode()
    return Device(index, f"sm{major}{minor}", name)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def use(index: int) -> None:
    """Make a GPU the current one of the calling thread."""
    _call("cudaSetDevice", index)


def memory() -> tuple[int, int]:
    """Free and total memory of the current GPU, in bytes."""
    free, total = _call("cudaMemGetInfo")
    return int(free), int(total)


class DeviceBuffer:
    """Memory of the current GPU, aligned to 256 bytes; its bytes are undefined at first.

    Raises:
        OutOfMemoryError: there is not enough.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        try:
            self.address: int = _call("cudaMalloc", max(1, nbytes))
        except OutOfMemoryError:
            free, total = (f"{size / 2**30:.2f}" for size in memory())
            message = f"the GPU is out of memory: {nbytes / 2**30:.2f} GiB more are needed, {free} of {total} are free"
            raise OutOfMemoryError(message, SMALLER) from None

    def free(self) -> None:
        """Give the memory back; a second call does nothing. Nothing in any stream may still use it."""
        address, self.address = self.address, 0
        if address:
            with contextlib.suppress(BackendError):  # An earlier failure would only be told again.
                _call("cudaFree", address)


def read(address: int, array: NDArray[Any]) -> None:
    """Fill an array, which is contiguous, from an address of the current GPU; it is done on return."""
    _call("cudaMemcpy", array.ctypes.data, address, array.nbytes, _runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost)


class PinnedBuffer:
    """Memory of the host that a GPU copies from and to by itself."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address: int = _call("cudaMallocHost", max(1, nbytes))

    def view(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Its first bytes as an array, which is not to be used after :meth:`free`."""
        raw = (ctypes.c_byte * (math.prod(shape) * dtype.itemsize)).from_address(self.address)
        return np.ndarray(shape, dtype, memoryview(raw))

    def free(self) -> None:
        """Give the memory back; a second call does nothing."""
        address, self.address = self.address, 0
        if address:
            with contextlib.suppress(BackendError):
                _call("cudaFreeHost", address)


class Graph:
    """Work recorded by :meth:`Stream.capture`. It names memory by address: nobody may launch it once that is freed."""

    def __init__(self, executable: Any) -> None:
        self.executable = executable

    def close(self) -> None:
        """Drop it; a second call does nothing."""
        executable, self.executable = self.executable, None
        if executable is not None:
            with contextlib.suppress(BackendError):
                _call("cudaGraphExecDestroy", executable)


class Stream:
    """A queue of work on the current GPU. Nothing it was given is certain to be done before :meth:`synchronize`."""

    def __init__(self) -> None:
        self._stream: Any = _call("cudaStreamCreateWithFlags", _runtime().cudaStreamNonBlocking)

    @property
    def handle(self) -> int:
        """As other libraries take it."""
        return int(self._stream)

    def to_device(self, target: int, source: int, nbytes: int) -> None:
        """Queue a copy from an address of the host to one of the GPU."""
        _call("cudaMemcpyAsync", target, source, nbytes, _runtime().cudaMemcpyKind.cudaMemcpyHostToDevice, self._stream)

    def to_host(self, target: int, source: int, nbytes: int) -> None:
        """Queue a copy from an address of the GPU to one of the host."""
        _call("cudaMemcpyAsync", target, source, nbytes, _runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost, self._stream)

    def on_device(self, target: int, source: int, nbytes: int) -> None:
        """Queue a copy from an address of the GPU to another."""
        kind = _runtime().cudaMemcpyKind.cudaMemcpyDeviceToDevice
        _call("cudaMemcpyAsync", target, source, nbytes, kind, self._stream)

    def synchronize(self) -> None:
        """Wait until all that was queued is done.

        Raises:
            BackendError: some of it failed.
        """
        _call("cudaStreamSynchronize", self._stream)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """Record what ``enqueue`` queues here, without doing it.

        Raises:
            BackendError: it cannot be recorded.
        """
        runtime = _runtime()
        _call("cudaStreamBeginCapture", self._stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            enqueue()
        except BaseException:
            # A capture is ended in any case: until then the stream can do nothing else.
            status, graph = runtime.cudaStreamEndCapture(self._stream)
            if not int(status):
                runtime.cudaGraphDestroy(graph)
            runtime.cudaGetLastError()
            raise
        graph = _call("cudaStreamEndCapture", self._stream)
        try:
            return Graph(_call("cudaGraphInstantiate", graph, 0))
        finally:
            _call("cudaGraphDestroy", graph)

    def launch(self, graph: Graph) -> None:
        """Queue recorded work."""
        _call("cudaGraphLaunch", graph.executable, self._stream)

    def close(self) -> None:
        """Give the stream back; a second call does nothing."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(BackendError):
                _call("cudaStreamDestroy", stream)
