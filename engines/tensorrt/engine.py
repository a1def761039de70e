"""TensorRT: runs the plans that ``zimg-export compile`` put into a bundle, with TensorRT and CUDA's bindings alone.

A run copies its inputs through pinned memory into buffers that stay, and its outputs back; what was uploaded is read
where it lies. The second run of the same shapes in the same buffers is recorded as a CUDA graph, which later ones
replay.
Tested against an imitation of TensorRT and CUDA only: it never ran on a GPU.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.base import Feeds, check_feeds
from zimgkit.engines.errors import BackendError, UsageError
from zimgkit.engines.tensorrt import api as tensorrt_api
from zimgkit.engines.tensorrt import cuda
from zimgkit.engines.tensorrt.plan import Plan, Shape, choose_plan, choose_profile, compile_command

if TYPE_CHECKING:
    from zimgkit.engines.bundle import Bundle

MAX_GRAPHS = 8
"""Runs an engine remembers. A loop with guidance alternates between two."""
SCRATCH = ""
"""Among the device's buffers, which bear the names of inputs and outputs: what TensorRT computes in."""
FLOAT32 = np.dtype(np.float32)

Key = tuple[int, tuple[tuple[Shape, int], ...]]
"""What makes a run the same as another: the profile, and shape and address of every input."""


def open_engine(bundle: Bundle, component: str, device: str | None = None) -> TensorRTEngine:
    """Load a component's plan onto a GPU.

    Args:
        bundle: an open bundle.
        component: a component that has a graph.
        device: ``"cuda"`` or ``"cuda:N"``; the first GPU when not given.

    Raises:
        UsageError: no such kind of device.
        BackendError: TensorRT, the driver or the GPU is missing, or the bundle has no plan for them.
        OutOfMemoryError: the GPU has too little memory.
        BundleError: no such component, or the plan is not what the manifest says.
    """
    index = _parse_device(device or "cuda")
    if not bundle.component(component).graphs:
        raise BackendError(f"{component} is a table of tensors and has no graph to run")
    trt = tensorrt_api.load()
    found = cuda.open_device(index)  # First: without a driver TensorRT's runtime crashes the process.
    entry = choose_plan(bundle, component, tensorrt_api.name(trt), tensorrt_api.version(trt), found.architecture)
    return TensorRTEngine(bundle, component, Plan(trt, bundle, entry), index)


def _parse_device(device: str) -> int:
    if match := re.fullmatch(r"cuda(?::(\d{1,4}))?", device):
        return int(match[1] or 0)
    raise UsageError(f"TensorRT has no device {device!r}", "choose cuda or cuda:N")


class Uploaded:
    """An input on the device, for many runs of one engine. Its memory is reused or freed after it is dropped."""

    def __init__(self, owner: TensorRTEngine, address: int, array: NDArray[Any]) -> None:
        self.owner = owner
        self.address = address
        self.like: NDArray[Any] = np.broadcast_to(np.zeros((), array.dtype), array.shape)
        """Its element type and shape, as an array without content."""


class _Context:
    """An execution context, and what was last set in it, so that nothing is set twice."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._context = plan.context()
        self._profile: int | None = None
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self.scratch_bytes = 0
        """How much it computes in, for the shapes set last."""

    def shape(self, profile: int, shapes: dict[str, Shape], stream: cuda.Stream) -> None:
        """Set the shapes of the inputs."""
        doing = f"take inputs of {', '.join(f'{name} {shape}' for name, shape in shapes.items())}"
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, stream.handle):
                raise self._plan.refusal(doing)
            self._profile, self._shapes, self._addresses = profile, {}, {}
        if shapes == self._shapes:
            return
        for name, shape in shapes.items():
            if self._shapes.get(name) != shape and not self._context.set_input_shape(name, shape):
                self._shapes = {}
                raise self._plan.refusal(doing)
        self._shapes, self._scratch = shapes, (0, 0)
        self.scratch_bytes = self._context.update_device_memory_size_for_shapes()

    def output_shape(self, name: str) -> Shape:
        """Of an output, for the shapes set last."""
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise self._plan.refusal(f"tell the shape of {name}")
        return shape

    def bind(self, addresses: dict[str, int], scratch: cuda.DeviceBuffer) -> None:
        """Say where inputs, outputs and scratch memory lie."""
        for name, address in addresses.items():
            if self._addresses.get(name) != address and not self._context.set_tensor_address(name, address):
                self._addresses = {}
                raise self._plan.refusal(f"take {name} from its buffer")
        self._addresses = addresses
        if self._scratch != (scratch.address, scratch.nbytes):
            self._scratch = (scratch.address, scratch.nbytes)
            self._context.set_device_memory(*self._scratch)

    def enqueue(self, stream: cuda.Stream) -> None:
        """Queue a run."""
        if not self._context.execute_async_v3(stream.handle):
            raise self._plan.refusal(f"run {self._plan.entry.component}")


@dataclass
class _Recorded:
    """A run, recorded.

    It keeps its context, for a graph is void once the context it came from is changed:
    https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/best-practices.html, on CUDA graphs.
    """

    graph: cuda.Graph
    context: _Context
    outputs: dict[str, Shape]
    addresses: frozenset[int]
    """All memory it uses."""


class TensorRTEngine:
    """One plan on one GPU. Use :func:`open_engine`."""

    def __init__(self, bundle: Bundle, component: str, plan: Plan, index: int) -> None:
        self._plan: Plan | None = plan
        self._index = index
        self._context: _Context | None = None
        self._stream: cuda.Stream | None = None
        self._device: dict[str, cuda.DeviceBuffer] = {}
        self._pinned: dict[str, cuda.PinnedBuffer] = {}
        self._uploads: dict[int, cuda.DeviceBuffer] = {}
        # Names and addresses of uploads nobody holds any more: noted at any time, reused or freed between runs.
        self._dropped: deque[tuple[str, int]] = deque()
        # The latest last; None where it ran once, and is recorded when it comes again.
        self._runs: OrderedDict[Key, _Recorded | None] = OrderedDict()
        self._records = True
        self._hint = f"compile it for this too: {compile_command(bundle)}"
        self.name = component
        self.inputs, self.outputs = bundle.component(component).inputs, bundle.component(component).outputs
        try:
            self._stream = cuda.Stream()
            self._context = _Context(plan)
        except BaseException:
            self.close()
            raise

    @property
    def memory_bytes(self) -> int:
        """Memory of the device it holds: weights, buffers, and what was uploaded."""
        buffers = [*self._device.values(), *self._uploads.values()]
        return sum(buffer.nbytes for buffer in buffers) + (self._plan.memory_bytes if self._plan else 0)

    def upload(self, feeds: Mapping[str, NDArray[Any]]) -> Feeds:
        """Copy inputs to the device once; runs then read them where they lie.

        Raises:
            OutOfMemoryError: the GPU has too little memory.
        """
        _, _, stream = self._open()
        handles = {}
        for name, value in feeds.items():
            array = np.asarray(value, order="C")
            address = self._place(name, array.nbytes)
            handles[name] = Uploaded(self, address, array)
            weakref.finalize(handles[name], self._dropped.append, (name, address)).atexit = False
            stream.to_device(address, array.ctypes.data, array.nbytes)
            stream.synchronize()
        return handles

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        """Run the plan.

        Raises:
            OutOfMemoryError: the GPU has too little memory for these shapes.
            BackendError: an input is missing or misshapen, the plan does not serve its shape, or the GPU failed.
        """
        plan, context, stream = self._open()
        while self._dropped:
            self._free(self._uploads.pop(self._dropped.popleft()[1]))
        arrays = {name: self._array(name, value) for name, value in feeds.items()}
        check_feeds(self.name, self.inputs, arrays)
        shapes = {name: arrays[name].shape for name in self.inputs}
        profile = choose_profile(self.name, self.inputs, plan.entry.profiles, shapes, self._hint)
        # All memory is got before anything is queued: where there is too little, nothing has begun.
        fresh = {name: value for name, value in feeds.items() if isinstance(value, np.ndarray)}
        addresses = {
            name: self._reserve(name, fresh[name].nbytes) if name in fresh else feeds[name].address
            for name in self.inputs
        }
        key = (profile, tuple((shapes[name], addresses[name]) for name in self.inputs))
        if recorded := self._runs.get(key):
            self._runs.move_to_end(key)
            return self._execute(stream, partial(stream.launch, recorded.graph), fresh, recorded.outputs)
        own = self._own_context(plan) if key in self._runs else None
        context = own or context
        context.shape(profile, shapes, stream)
        outputs = {name: context.output_shape(name) for name in self.outputs}
        for name, shape in outputs.items():
            addresses[name] = self._reserve(name, FLOAT32.itemsize * int(np.prod(shape)))
        scratch = self._grow(SCRATCH, context.scratch_bytes)
        context.bind(addresses, scratch)
        results = self._execute(stream, partial(context.enqueue, stream), fresh, outputs)
        if own:
            # After a plain run, in which TensorRT settles what new shapes ask for.
            self._record(stream, key, own, outputs, frozenset([*addresses.values(), scratch.address]))
        elif self._records:
            self._runs[key] = None
        while len(self._runs) > MAX_GRAPHS:
            self._forget(next(iter(self._runs)))
        return results

    def close(self) -> None:
        """Free all memory of the device. A closed engine cannot run again."""
        if self._plan is None:
            return
        with contextlib.suppress(BackendError):
            cuda.use(self._index)
        for key in list(self._runs):
            self._forget(key)
        # Contexts go before the engine they are of, and both before the memory they use.
        self._context = None
        self._plan.close()
        self._plan = None
        for buffer in (*self._device.values(), *self._uploads.values()):
            buffer.free()
        for pinned in self._pinned.values():
            pinned.free()
        self._device, self._pinned, self._uploads = {}, {}, {}
        if self._stream:
            self._stream.close()

    def __del__(self) -> None:
        self.close()

    def _open(self) -> tuple[Plan, _Context, cuda.Stream]:
        if not (self._plan and self._context and self._stream):
            raise BackendError(f"the engine of {self.name} is closed", "open it again")
        cuda.use(self._index)
        self._plan.errors.clear()
        return self._plan, self._context, self._stream

    def _array(self, name: str, value: Any) -> NDArray[Any]:
        if isinstance(value, np.ndarray):
            return value
        if isinstance(value, Uploaded) and value.owner is self:
            return value.like
        raise BackendError(f"{self.name} takes {name!r} as an array, or as this engine's own upload gave it")

    def _place(self, name: str, nbytes: int) -> int:
        """The address for an upload: that of a dropped one alike, which recorded runs know, or a new one."""
        for noted in list(self._dropped):
            if noted[0] == name and self._uploads[noted[1]].nbytes == nbytes:
                self._dropped.remove(noted)
                return noted[1]
        buffer = cuda.DeviceBuffer(nbytes)
        self._uploads[buffer.address] = buffer
        return buffer.address

    def _reserve(self, name: str, nbytes: int) -> int:
        """The address of a buffer for an input or output, with pinned memory to match."""
        pinned = self._pinned.get(name)
        if pinned is None or pinned.nbytes < nbytes:
            if pinned:
                self._pinned.pop(name).free()
            self._pinned[name] = cuda.PinnedBuffer(nbytes)
        return self._grow(name, nbytes).address

    def _grow(self, name: str, nbytes: int) -> cuda.DeviceBuffer:
        """The device's buffer of that name; another where it is too small."""
        buffer = self._device.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            if buffer:
                self._free(self._device.pop(name))
            buffer = self._device[name] = cuda.DeviceBuffer(nbytes)
        return buffer

    def _free(self, buffer: cuda.DeviceBuffer) -> None:
        """Free memory of the device, and forget the runs that used it."""
        for key, recorded in list(self._runs.items()):
            used = recorded.addresses if recorded else {address for _, address in key[1]}
            if buffer.address in used:
                self._forget(key)
        buffer.free()

    def _forget(self, key: Key) -> None:
        if recorded := self._runs.pop(key):
            recorded.graph.close()

    def _execute(
        self, stream: cuda.Stream, enqueue: Callable[[], None], fresh: Feeds, outputs: Mapping[str, Shape]
    ) -> dict[str, NDArray[np.float32]]:
        """Copy inputs in, compute, copy outputs out; wait for it all."""
        try:
            for name, value in fresh.items():
                staged = self._pinned[name]
                np.copyto(staged.view(value.shape, value.dtype), value)
                stream.to_device(self._device[name].address, staged.address, value.nbytes)
            enqueue()
            found = {name: self._pinned[name].view(shape, FLOAT32) for name, shape in outputs.items()}
            for name, array in found.items():
                stream.to_host(self._pinned[name].address, self._device[name].address, array.nbytes)
        finally:
            stream.synchronize()
        return {name: array.copy() for name, array in found.items()}

    def _own_context(self, plan: Plan) -> _Context | None:
        """A context for one run to be recorded; None where there cannot be one."""
        try:
            return _Context(plan)
        except BackendError:
            self._record_no_more()
            return None

    def _record(
        self, stream: cuda.Stream, key: Key, context: _Context, outputs: dict[str, Shape], addresses: frozenset[int]
    ) -> None:
        """Record the run that ``context`` has just done."""
        try:
            graph = stream.capture(partial(context.enqueue, stream))
        except BackendError:
            self._record_no_more()
        else:
            self._runs[key] = _Recorded(graph, context, outputs, addresses)

    def _record_no_more(self) -> None:
        """Some plans cannot be recorded, such as those that stream their weights. They run as before."""
        self._records = False
        for key in list(self._runs):
            self._forget(key)
