"""An imitation of CUDA's runtime and of TensorRT, for tests on machines that have neither.

Device memory is memory of the host, and a plan names an ONNX model, which ONNX Runtime runs on the bound addresses.
Work queued in a stream is done when the stream is waited for, as late as CUDA may do it. What a GPU would answer with a
wrong picture or a crash raises :class:`Misuse` here: an address that is not the device's, a buffer too small or freed,
a shape not set or out of the profile, a graph whose context or memory has changed since. Threads may use it, each with
a current device of its own.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from zimgkit.engines.bundle import CPU_GRAPH, Bundle, CompiledEngine, Range, record_files, write_manifest

VERSION = "11.4.0.106"
POISON = 0xA5
ALIGNMENT = 256
KINDS = {"float32": np.float32, "int64": np.int64, "bool": np.bool_, "bfloat16": np.uint16}
OUT_OF_MEMORY, NOT_CAPTURABLE, INSUFFICIENT_DRIVER, NO_DEVICE, INVALID_DEVICE = 2, 900, 35, 100, 101


class Misuse(BaseException):
    """What would be undefined behaviour. No ``except Exception`` swallows it."""


class CudaError(Exception):
    """A status other than success."""


@dataclass
class Allocation:
    address: int
    nbytes: int
    pinned: bool
    store: Any
    freed: bool = False


@dataclass
class Work:
    """What is queued, and the addresses of the device that it uses."""

    act: Callable[[], None]
    addresses: frozenset[int]


@dataclass
class Stream:
    pending: list[Work] = field(default_factory=list)
    capture: list[Work] | None = None
    captured_by: int = 0
    """The thread."""
    closed: bool = False


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    values: tuple[Any, ...]
    types: tuple[Any, ...]


@dataclass
class Machine:
    """One host with GPUs. Tests set what it lacks, and read what happened on it."""

    compiler: str = "tensorrt"
    gpus: int = 1
    capability: tuple[int, int] = (9, 0)
    driver: int = 13000
    memory: int = 1 << 30
    fail: dict[str, int] = field(default_factory=dict)
    """Function -> the status it answers with."""
    calls: list[str] = field(default_factory=list)
    """Functions called, in order."""
    allocations: dict[int, Allocation] = field(default_factory=dict)
    streams: dict[int, Stream] = field(default_factory=dict)
    graphs: dict[int, list[Work]] = field(default_factory=dict)
    executables: dict[int, list[Work]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    """One call at a time."""
    local: threading.local = field(default_factory=threading.local)
    reserved: int = 0
    """Device memory of plans."""
    contexts: int = 0
    """Execution contexts made so far."""
    numbers: int = 1000
    reject: set[str] = field(default_factory=set)
    """Methods of TensorRT that refuse."""
    launches: list[Launch] = field(default_factory=list)

    @property
    def current(self) -> int | None:
        """The device that the thread has chosen."""
        return getattr(self.local, "current", None)

    @current.setter
    def current(self, index: int) -> None:
        self.local.current = index

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def count(self, name: str) -> int:
        return self.calls.count(name)

    @property
    def used(self) -> int:
        live = [a.nbytes for a in self.allocations.values() if not a.freed and not a.pinned]
        return sum(live) + self.reserved

    @property
    def leaks(self) -> list[Allocation]:
        return [allocation for allocation in self.allocations.values() if not allocation.freed]

    def allocate(self, nbytes: int, pinned: bool) -> int:
        self.check_capture("allocated")
        if not pinned and self.used + nbytes > self.memory:
            raise CudaError(OUT_OF_MEMORY)
        store = (ctypes.c_ubyte * (nbytes + ALIGNMENT))()
        ctypes.memset(store, POISON, len(store))
        address = -(-ctypes.addressof(store) // ALIGNMENT) * ALIGNMENT
        # What is freed stays in the table, and its memory stays taken: no address comes twice.
        self.allocations[address] = Allocation(address, nbytes, pinned, store)
        return address

    def check_capture(self, what: str) -> None:
        if any(s.capture is not None and s.captured_by == threading.get_ident() for s in self.streams.values()):
            raise Misuse(f"memory is {what} while a stream captures")

    def free(self, address: int, pinned: bool) -> None:
        self.check_capture("freed")
        allocation = self.find(address, 0, pinned)
        if allocation.address != address:
            raise Misuse("what is freed was not allocated")
        used = {used for stream in self.streams.values() for work in stream.pending for used in work.addresses}
        if any(address <= other < address + max(1, allocation.nbytes) for other in used):
            raise Misuse("memory is freed while work is under way")
        allocation.freed = True
        ctypes.memset(address, POISON, allocation.nbytes)

    def find(self, address: int, nbytes: int, pinned: bool) -> Allocation:
        for allocation in self.allocations.values():
            if allocation.address <= address < allocation.address + max(1, allocation.nbytes):
                if allocation.freed:
                    raise Misuse(f"{address:#x} was freed")
                if allocation.pinned != pinned:
                    raise Misuse(f"{address:#x} is not {'pinned' if pinned else 'on the device'}")
                if address + nbytes > allocation.address + allocation.nbytes:
                    raise Misuse(f"{nbytes} bytes at {address:#x} leave their buffer")
                return allocation
        raise Misuse(f"{address:#x} is no memory of the device or pinned")

    def queue(self, handle: int, act: Callable[[], None], *addresses: int) -> None:
        stream, work = self.stream(handle), Work(act, frozenset(addresses))
        (stream.pending if stream.capture is None else stream.capture).append(work)

    def stream(self, handle: int) -> Stream:
        if handle not in self.streams or self.streams[handle].closed:
            raise Misuse("no such stream")
        return self.streams[handle]


# CUDA


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = OUT_OF_MEMORY
    cudaErrorInsufficientDriver = INSUFFICIENT_DRIVER
    cudaErrorNoDevice = NO_DEVICE
    cudaErrorInvalidDevice = INVALID_DEVICE
    cudaErrorStreamCaptureUnsupported = NOT_CAPTURABLE
    cudaErrorIllegalAddress = 700
    cudaErrorUnknown = 999


def fake_runtime(machine: Machine) -> ModuleType:
    """The part of ``cuda.bindings.runtime`` that is used."""
    module = ModuleType("cuda.bindings.runtime")

    def function(results: int = 0, needs_device: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Name it in ``machine.calls``, and give (status, results)."""

        def wrap(body: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> tuple[Any, ...]:
                with machine.lock:
                    return answer(*arguments)

            def answer(*arguments: Any) -> tuple[Any, ...]:
                machine.calls.append(body.__name__)
                if needs_device and machine.current is None:
                    raise Misuse(f"{body.__name__} before a device was chosen")
                if status := machine.fail.get(body.__name__):
                    if body.__name__ in ("cudaStreamEndCapture", "cudaStreamSynchronize"):
                        machine.streams[arguments[0]] = Stream()  # What was under way has ended.
                    return (Error(status), *[None] * results)
                try:
                    value = body(*arguments)
                except CudaError as error:
                    return (Error(error.args[0]), *[None] * results)
                return (Error.cudaSuccess, *(value if results > 1 else [value] * results))

            setattr(module, body.__name__, call)
            return call

        return wrap

    @function(1, needs_device=False)
    def cudaDriverGetVersion() -> int:
        return machine.driver

    @function(1, needs_device=False)
    def cudaRuntimeGetVersion() -> int:
        return 13000

    @function(1, needs_device=False)
    def cudaGetDeviceCount() -> int:
        if machine.driver < 13000:
            raise CudaError(INSUFFICIENT_DRIVER)
        if machine.gpus == 0:
            raise CudaError(NO_DEVICE)
        return machine.gpus

    @function(needs_device=False)
    def cudaSetDevice(index: int) -> None:
        if not 0 <= index < machine.gpus:
            raise CudaError(INVALID_DEVICE)
        machine.current = index

    @function(1)
    def cudaDeviceGetAttribute(attribute: int, index: int) -> int:
        return machine.capability[attribute - 75]

    @function(1)
    def cudaGetDeviceProperties(index: int) -> Any:
        return SimpleNamespace(name=b"Imitation GPU")

    @function(2)
    def cudaMemGetInfo() -> tuple[int, int]:
        return machine.memory - machine.used, machine.memory

    @function(1)
    def cudaMalloc(nbytes: int) -> int:
        return machine.allocate(nbytes, pinned=False)

    @function(1)
    def cudaMallocHost(nbytes: int) -> int:
        return machine.allocate(nbytes, pinned=True)

    @function()
    def cudaFree(address: int) -> None:
        machine.free(address, pinned=False)

    @function()
    def cudaFreeHost(address: int) -> None:
        machine.free(address, pinned=True)

    @function()
    def cudaMemcpy(target: int, source: int, nbytes: int, kind: int) -> None:
        if kind != 2:
            raise Misuse("only copies to the host are waited for")
        machine.find(source, nbytes, pinned=False)
        ctypes.memmove(target, source, nbytes)

    @function()
    def cudaMemcpyAsync(target: int, source: int, nbytes: int, kind: int, handle: int) -> None:
        on_device = {1: [target], 2: [source], 3: [target, source]}[kind]

        def work() -> None:
            for address in on_device:
                machine.find(address, nbytes, pinned=False)
            ctypes.memmove(target, source, nbytes)

        for address in on_device:
            machine.find(address, nbytes, pinned=False)
        if kind == 2:
            # Until it is done, what is there is not what will be.
            machine.find(target, nbytes, pinned=True)
            ctypes.memset(target, POISON, nbytes)
        machine.queue(handle, work, target, source)

    @function(1)
    def cudaStreamCreateWithFlags(flags: int) -> int:
        if flags != 1:
            raise Misuse("a stream that waits for the default stream")
        handle = machine.number()
        machine.streams[handle] = Stream()
        return handle

    @function()
    def cudaStreamSynchronize(handle: int) -> None:
        stream = machine.stream(handle)
        if stream.capture is not None:
            raise Misuse("a stream that captures is waited for")
        pending, stream.pending = stream.pending, []
        for work in pending:
            work.act()

    @function()
    def cudaStreamDestroy(handle: int) -> None:
        machine.stream(handle).closed = True

    @function()
    def cudaStreamBeginCapture(handle: int, mode: int) -> None:
        stream = machine.stream(handle)
        if stream.capture is not None:
            raise Misuse("the stream captures already")
        stream.capture, stream.captured_by = [], threading.get_ident()

    @function(1)
    def cudaStreamEndCapture(handle: int) -> int:
        stream = machine.stream(handle)
        if stream.capture is None:
            raise Misuse("the stream does not capture")
        graph, recorded = machine.number(), stream.capture
        stream.capture = None
        machine.graphs[graph] = recorded
        return graph

    @function(1)
    def cudaGraphInstantiate(graph: int, flags: int) -> int:
        executable = machine.number()
        machine.executables[executable] = machine.graphs[graph]
        return executable

    @function()
    def cudaGraphDestroy(graph: int) -> None:
        del machine.graphs[graph]

    @function()
    def cudaGraphLaunch(executable: int, handle: int) -> None:
        if executable not in machine.executables:
            raise Misuse("no such graph")
        for work in machine.executables[executable]:
            machine.queue(handle, work.act, *work.addresses)

    @function()
    def cudaGraphExecDestroy(executable: int) -> None:
        acts = [work.act for work in machine.executables.pop(executable)]
        if any(work.act in acts for stream in machine.streams.values() for work in stream.pending):
            raise Misuse("a graph is dropped while work is under way")

    module.cudaGetErrorString = lambda status: (Error.cudaSuccess, status.name.encode())  # type: ignore[attr-defined]
    module.cudaGetLastError = lambda: (Error.cudaSuccess,)  # type: ignore[attr-defined]
    module.cudaError_t = Error  # type: ignore[attr-defined]
    module.cudaStreamNonBlocking = 1  # type: ignore[attr-defined]
    module.cudaMemcpyKind = SimpleNamespace(  # type: ignore[attr-defined]
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    module.cudaDeviceAttr = SimpleNamespace(  # type: ignore[attr-defined]
        cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76
    )
    module.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # type: ignore[attr-defined]
    return module


class DriverError(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_NOT_FOUND = 500


def fake_driver(machine: Machine) -> ModuleType:
    """The part of ``cuda.bindings.driver`` that is used; launches are kept in ``machine.launches``."""
    module = ModuleType("cuda.bindings.driver")
    parts: dict[str, Any] = {
        "CUfunction_attribute": SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8),
        "cuGetErrorString": lambda status: (DriverError(0), DriverError(status).name.encode()),
    }

    def function(body: Callable[..., Any]) -> None:
        def call(*arguments: Any) -> tuple[Any, ...]:
            with machine.lock:
                machine.calls.append(body.__name__)
                try:
                    value = body(*arguments)
                except CudaError as error:
                    return (DriverError(error.args[0]), None)
            return (DriverError(0), *([] if value is None else [value]))

        parts[body.__name__] = call

    @function
    def cuInit(flags: int) -> None:
        if machine.gpus == 0:
            raise RuntimeError("Function cuInit not found")

    @function
    def cuLibraryLoadData(code: bytes, *options: Any) -> bytes:
        if code[:4] != b"\x7fELF":
            raise CudaError(DriverError.CUDA_ERROR_INVALID_IMAGE)
        return code

    @function
    def cuLibraryGetKernel(library: bytes, name: bytes) -> Any:
        if name not in library:
            raise CudaError(DriverError.CUDA_ERROR_NOT_FOUND)
        return SimpleNamespace(name=name.decode(), shared=48 * 1024)

    @function
    def cuKernelSetAttribute(attribute: int, value: int, kernel: Any, device: int) -> None:
        kernel.shared = value

    @function
    def cuLaunchKernel(kernel: Any, *rest: Any) -> None:
        *grid, x, y, z, shared, stream, (values, types), _ = rest
        if shared > kernel.shared or min(*grid, x, y, z) < 1 or max(grid[1:]) > 65535:
            raise Misuse("the kernel cannot be launched so")
        for value, kind in zip(values, types, strict=True):
            kind(value)
        machine.launches.append(Launch(kernel.name, tuple(grid), (x, y, z), shared, stream, values, types))

    for part, value in parts.items():
        setattr(module, part, value)
    return module


# TensorRT


class Severity(Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO = Severity


class Mode(Enum):
    NONE, INPUT, OUTPUT = range(3)


class Location(Enum):
    DEVICE, HOST = range(2)


class DataType(Enum):
    FLOAT, HALF, INT64, BOOL, BF16 = range(5)


class Strategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class Specialization(Enum):
    LAZY, EAGER, NONE = range(3)


NAMES = {"float32": DataType.FLOAT, "int64": DataType.INT64, "bool": DataType.BOOL, "bfloat16": DataType.BF16}


def write_plan(
    path: Path, graph: Path, inputs: Any, outputs: Any, profiles: Any, stripped: bool, changes: dict[str, Any]
) -> None:
    """A file that :class:`Runtime` loads: what a plan says of itself, and where the graph it was made from lies.

    ``changes`` replace what it says.
    """
    content = {
        "graph": str(graph),
        "inputs": {name: [spec.dtype, spec.shape] for name, spec in inputs.items()},
        "outputs": {name: [spec.dtype, spec.shape] for name, spec in outputs.items()},
        "profiles": list(profiles) or [{}],
        "weights": 0 if stripped else 1000,
        "streamable": 800,
        "scratch": 3,
        "location": "DEVICE",
        "stripped": stripped,
    } | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"PLAN" + json.dumps(content).encode())


class Engine:
    def __init__(self, machine: Machine, log: Any, content: dict[str, Any]) -> None:
        self.machine, self.log, self.content = machine, log, content
        self.weights = content["weights"]
        machine.reserved += self.weights
        self.session: Any = None
        self.contexts = 0
        self.exchanged: set[str] = set()
        self.budget: int | None = None
        self.num_optimization_profiles = len(content["profiles"])
        self.ends = content["inputs"] | content["outputs"]
        self.num_io_tensors = len(self.ends)
        if not content["stripped"]:
            self.load({})

    def __del__(self) -> None:
        self.machine.reserved -= self.weights

    def load(self, weights: dict[str, np.ndarray]) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        values = [ort.OrtValue.ortvalue_from_numpy(value) for value in weights.values()]
        if weights:
            options.add_external_initializers(list(weights), values)
        self.session = ort.InferenceSession(self.content["graph"], options)

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph on the host; bfloat16 goes in and out as 16-bit patterns."""
        import onnxruntime as ort

        values = {}
        for name, array in inputs.items():
            if self.ends[name][0] == "bfloat16":
                values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.copy(), 16)
            else:
                values[name] = ort.OrtValue.ortvalue_from_numpy(array.copy())
        names = list(self.content["outputs"])
        found = {}
        for name, value in zip(names, self.session.run_with_ort_values(names, values), strict=True):
            if self.ends[name][0] == "bfloat16":
                found[name] = np.empty(value.shape(), np.uint16)
                ort.OrtValue.ortvalue_from_numpy_with_onnx_type(found[name], 16).update_inplace(value)
            else:
                found[name] = np.array(value.numpy())
        return found

    def refuse(self, method: str, message: str = "it was told to refuse") -> bool:
        if method in self.machine.reject:
            self.log.log(Severity.ERROR, f"[{method}]\n  {message}")
            self.log.log(Severity.ERROR, "and a consequence")
            return True
        return False

    def get_tensor_name(self, index: int) -> str:
        return list(self.ends)[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self.content["inputs"] else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return NAMES[self.ends[name][0]]

    def get_tensor_location(self, name: str) -> Location:
        return Location[self.content["location"]]

    @property
    def streamable_weights_size(self) -> int:
        return int(self.content["streamable"])

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self.streamable_weights_size if self.budget is None else self.budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if self.contexts:
            raise Misuse("the budget is set while there are contexts")
        self.budget = budget

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(strategy=Strategy.STATIC)
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        return config

    def create_execution_context(self, config: Any) -> Context | None:
        if self.refuse("create_execution_context"):
            return None
        if config.strategy is not Strategy.USER_MANAGED:
            raise Misuse("the context takes memory of its own")
        self.contexts += 1
        self.machine.contexts += 1
        context = Context(self)
        context.specialization = getattr(config, "dynamic_shapes_kernel_specialization_strategy", Specialization.LAZY)
        return context


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.machine = engine, engine.machine
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self.needed: int | None = None
        self.version = 0
        self.flushed = -1
        self.specialization = Specialization.LAZY

    def __del__(self) -> None:
        self.engine.contexts -= 1

    def changed(self, name: str) -> None:
        self.machine.calls.append(name)
        self.version += 1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.changed("set_optimization_profile_async")
        self.machine.stream(stream)
        if self.engine.refuse("set_optimization_profile_async"):
            return False
        if not 0 <= index < self.engine.num_optimization_profiles:
            raise Misuse(f"there is no profile {index}")
        self.profile, self.shapes = index, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.changed("set_input_shape")
        if type(shape) is not tuple or any(type(side) is not int for side in shape):
            raise Misuse(f"a shape is a tuple of int, not {shape!r}")
        if self.engine.refuse("set_input_shape"):
            return False
        ranges = self.engine.content["profiles"][self.profile]
        _, sides = self.engine.content["inputs"][name]
        for side, length in zip(sides, shape, strict=True):
            low, _, high = ranges.get(side, (1, 1, 1 << 40)) if isinstance(side, str) else (side, side, side)
            if not low <= length <= high:
                raise Misuse(f"{name} {shape} is out of profile {self.profile}")
        self.shapes[name] = shape
        self.needed = None
        return True

    def sides(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, (_, sides) in self.engine.content["inputs"].items():
            if name not in self.shapes:
                raise Misuse(f"the shape of {name} is not set")
            for side, length in zip(sides, self.shapes[name], strict=True):
                if isinstance(side, str) and found.setdefault(side, length) != length:
                    raise Misuse(f"{side} is {length} and {found[side]}")
        return found

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if "get_tensor_shape" in self.machine.reject:
            return (-1, 4)
        if name in self.shapes:
            return self.shapes[name]
        sides = self.sides()
        _, shape = self.engine.content["outputs"][name]
        return tuple(eval(side, {}, sides) if isinstance(side, str) else side for side in shape)

    def update_device_memory_size_for_shapes(self) -> int:
        self.machine.calls.append("update_device_memory_size_for_shapes")
        self.sides()
        self.scratch = None  # It is divided anew.
        self.needed = self.engine.content["scratch"] * sum(math.prod(shape) for shape in self.shapes.values())
        return self.needed

    def set_device_memory(self, memory: int, size: int) -> None:
        self.changed("set_device_memory")
        self.scratch = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.changed("set_tensor_address")
        if self.engine.refuse("set_tensor_address"):
            return False
        self.machine.find(memory, 1, pinned=False)
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        with self.machine.lock:
            return self.enqueue(stream_handle)

    def enqueue(self, stream_handle: int) -> bool:
        self.machine.calls.append("execute_async_v3")
        capturing = self.machine.stream(stream_handle).capture is not None
        if capturing and self.engine.refuse("capture"):
            return False
        if self.engine.refuse("execute_async_v3"):
            return False
        if capturing and self.flushed != self.version:
            raise Misuse("a context is captured that has not run since it was changed")
        if self.machine.compiler == "tensorrt_rtx" and self.specialization is not Specialization.EAGER:
            raise Misuse("kernels would still change")
        self.sides()
        if self.needed is None or self.scratch is None:
            raise Misuse("there is no scratch memory for these shapes")
        if self.scratch[1] < self.needed or self.scratch[0] % ALIGNMENT:
            raise Misuse("the scratch memory is too small, or not aligned")
        if missing := self.engine.ends.keys() - self.addresses.keys():
            raise Misuse(f"no address for {missing}")
        version, shapes = self.version, {name: self.get_tensor_shape(name) for name in self.engine.ends}

        def work() -> None:
            if self.version != version:
                raise Misuse("the context was changed before its work was done, or since it was captured")
            self.compute(shapes)

        self.flushed = self.version
        self.machine.queue(stream_handle, work, self.scratch[0], *self.addresses.values())
        return True

    def compute(self, shapes: dict[str, tuple[int, ...]]) -> None:
        assert self.scratch is not None
        self.machine.find(*self.scratch, pinned=False)
        ctypes.memset(self.scratch[0], POISON, self.scratch[1])
        views = {}
        for name, shape in shapes.items():
            kind = np.dtype(KINDS[self.engine.ends[name][0]])
            nbytes = math.prod(shape) * kind.itemsize
            self.machine.find(self.addresses[name], nbytes, pinned=False)
            raw = (ctypes.c_ubyte * nbytes).from_address(self.addresses[name])
            views[name] = np.ndarray(shape, kind, memoryview(raw))
        for name, value in self.engine.run({name: views[name] for name in self.engine.content["inputs"]}).items():
            if value.shape != shapes[name] or value.dtype != views[name].dtype:
                raise Misuse(f"{name} is {value.shape}, and was to be {shapes[name]}")
            views[name][...] = value


class Runtime:
    def __init__(self, machine: Machine, log: Any) -> None:
        if machine.gpus == 0 or machine.driver < 13000:
            raise Misuse("TensorRT crashes where there is no driver")
        self.machine, self.log = machine, log
        if "Runtime" in machine.reject:
            log.log(Severity.ERROR, "CUDA initialization failure with error: 801")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
        data = bytes(plan)
        if not data.startswith(b"PLAN"):
            self.log.log(Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization\n (magic tag)")
            return None
        content = json.loads(data[4:])
        if self.machine.used + content["weights"] > self.machine.memory:
            self.log.log(Severity.ERROR, "[resizingAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)")
            self.log.log(Severity.ERROR, "Requested amount of GPU memory could not be allocated")
            return None
        return Engine(self.machine, self.log, content)


@dataclass
class Weights:
    type: DataType
    address: int
    count: int


class Refitter:
    """A plan's own words say what can be exchanged, and what only together (``"joined"``)."""

    def __init__(self, engine: Engine, log: Any) -> None:
        self.engine = engine
        self.found: dict[str, np.ndarray] = {}
        self.names = self.engine.content["refit"]

    def get_all_weights(self) -> list[str]:
        return list(self.names)

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        import onnx

        if name not in self.names or self.engine.refuse("set_named_weights"):
            return False
        model = onnx.load(self.engine.content["graph"], load_external_data=False)
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        if weights.type is not DataType.FLOAT or weights.count != math.prod(tensor.dims):
            raise Misuse(f"{name} was compiled from another type or size")
        raw = (ctypes.c_float * weights.count).from_address(weights.address)
        self.found[name] = np.ctypeslib.as_array(raw).reshape(tensor.dims)  # Read when the plan is refitted.
        return True

    def get_missing_weights(self) -> list[str]:
        groups = self.engine.content.get("joined", [])
        if self.engine.content["stripped"]:
            groups = [[name for name in self.names if not name.startswith("inline")]]
        return [name for group in groups if self.found.keys() & group for name in group if name not in self.found]

    def refit_cuda_engine(self) -> bool:
        if self.engine.refuse("refit_cuda_engine"):
            return False
        if self.get_missing_weights() or not self.found:
            raise Misuse(f"it was refitted with {sorted(self.found)}")
        self.engine.load(self.found)
        self.engine.exchanged = set(self.found)
        return True


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, log: Any) -> None:
        self.refitter = refitter
        self.given: dict[str, tuple[int, int]] | None = None

    def load_model_proto(self, model: bytes, path: str) -> bool:
        if bytes(model) != Path(path).read_bytes():
            raise Misuse("another model")
        self.given = {}
        return True

    def load_initializer(self, name: str, data: int, size: int) -> bool:
        if self.given is None:
            raise Misuse("weights before the model")
        self.given[name] = (data, size)
        return True

    def refit_model_proto(self) -> bool:
        import onnx

        model = onnx.load(self.refitter.engine.content["graph"], load_external_data=False)
        dims = {tensor.name: tensor.dims for tensor in model.graph.initializer}
        for name, (address, size) in (self.given or {}).items():
            raw = ctypes.string_at(address, size)
            self.refitter.found[name] = np.frombuffer(raw, np.float32).reshape(dims[name])
        return True


def fake_tensorrt(machine: Machine, version: str) -> ModuleType:
    """The part of ``tensorrt`` or ``tensorrt_rtx`` that is used to run."""
    module = ModuleType(machine.compiler)
    parts: dict[str, Any] = {
        "__version__": version,
        "ILogger": ILogger,
        "Runtime": lambda log: Runtime(machine, log),
        "Refitter": Refitter,
        "Weights": Weights,
        "OnnxParserRefitter": OnnxParserRefitter,
        "TensorIOMode": Mode,
        "TensorLocation": Location,
        "DataType": DataType,
        "ExecutionContextAllocationStrategy": Strategy,
    }
    if machine.compiler == "tensorrt_rtx":
        parts["DynamicShapesKernelSpecializationStrategy"] = Specialization
    for part, value in parts.items():
        setattr(module, part, value)
    return module


def install(monkeypatch: pytest.MonkeyPatch, *, version: str = VERSION, **options: Any) -> Machine:
    """Put the imitations in the place of the real modules; ``options`` are fields of :class:`Machine`."""
    machine = Machine(**options)
    cuda, bindings, runtime = ModuleType("cuda"), ModuleType("cuda.bindings"), fake_runtime(machine)
    driver = fake_driver(machine)
    cuda.bindings, bindings.runtime, bindings.driver = bindings, runtime, driver  # type: ignore[attr-defined]
    modules: dict[str, ModuleType | None] = {"tensorrt": None, "tensorrt_rtx": None}
    modules |= {machine.compiler: fake_tensorrt(machine, version)}
    modules |= {"cuda": cuda, "cuda.bindings": bindings}
    modules |= {"cuda.bindings.runtime": runtime, "cuda.bindings.driver": driver}
    for key, module in modules.items():
        if module:
            module.__spec__ = ModuleSpec(key, None)
        monkeypatch.setitem(sys.modules, key, module)
    return machine


def compile_bundle(
    root: Path, profiles: Sequence[dict[str, Range]] = (), *, plan: dict[str, Any] | None = None, **entry: Any
) -> Bundle:
    """Give a bundle a plan of every component, as if compiled for the imitated machine.

    Args:
        root: the bundle's folder, which is changed.
        profiles: of dynamic dimensions; a component takes those of its own. All sizes are served without.
        plan: what the plans say of themselves otherwise; see :func:`write_plan`.
        entry: fields of the manifest's entries.
    """
    bundle = Bundle.open(root)
    engines = []
    for name, component in bundle.manifest.components.items():
        if not component.graphs:
            continue
        dynamic = {side for spec in component.inputs.values() for side in spec.shape if isinstance(side, str)}
        own = [{side: ends for side, ends in ranges.items() if side in dynamic} for ranges in profiles]
        file = f"engines/{name}.plan"
        graph = component.graphs.get(CPU_GRAPH) or next(iter(component.graphs.values()))
        ends, stripped = (component.inputs, component.outputs), entry.get("stripped", False)
        write_plan(root / file, bundle.file(graph), *ends, own, stripped, plan or {})
        made = CompiledEngine(name, file, "tensorrt", "tensorrt", VERSION, "sm90", bundle.source_hash(name), tuple(own))
        engines.append(msgspec.structs.replace(made, **entry))
    manifest = msgspec.structs.replace(bundle.manifest, engines=tuple(engines), files=record_files(root))
    write_manifest(root, manifest)
    return Bundle.open(root)
