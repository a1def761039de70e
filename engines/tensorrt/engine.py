"""TensorRT: runs the plans that ``zimg-export compile`` put into a bundle, with TensorRT and CUDA's bindings alone.

A run copies its inputs through pinned memory into buffers that stay, and its outputs back; handles are read where they
lie. The second run of the same shapes in the same buffers is recorded as a CUDA graph, which later ones replay. It
writes its outputs into the same buffers each time: those that stay on the device are copied there into memory of their
own.
Tested against an imitation of TensorRT and CUDA only: it never ran on a GPU.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.base import BaseEngine, Feeds, Handle
from zimgkit.engines.errors import BackendError, UsageError
from zimgkit.engines.shapes import Shape, choose_profile
from zimgkit.engines.tensorrt import api as tensorrt_api
from zimgkit.engines.tensorrt import cuda
from zimgkit.engines.tensorrt.memory import Memory, Pool, pool_of
from zimgkit.engines.tensorrt.plan import LoadedPlan, choose_plan, compile_command
from zimgkit.engines.tensors.dtypes import BY_NAME, bfloat16_to_float32, float32_to_bfloat16

if TYPE_CHECKING:
    from zimgkit.engines.bundle import Bundle

MAX_GRAPHS = 8
"""Runs an engine remembers. A loop with guidance alternates between two."""
SCRATCH = ""
"""Among the device's buffers, which bear the names of inputs and outputs: what TensorRT computes in."""

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
    pool = pool_of(index)
    pool.trim()  # The weights are not the pool's to make room for.
    with contextlib.ExitStack() as undo:
        plan = LoadedPlan(trt, bundle, entry)
        undo.callback(plan.close)
        stream = cuda.Stream()
        undo.callback(stream.close)
        engine = TensorRTEngine(bundle, component, plan, _Context(plan), stream, pool)
        undo.pop_all()
    return engine


def _parse_device(device: str) -> int:
    if match := re.fullmatch(r"cuda(?::(\d{1,4}))?", device):
        return int(match[1] or 0)
    raise UsageError(f"TensorRT has no device {device!r}", "choose cuda or cuda:N")


class _Context:
    """An execution context, and what was last set in it, so that nothing is set twice."""

    def __init__(self, plan: LoadedPlan) -> None:
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


class TensorRTEngine(BaseEngine):
    """One plan on one GPU. Use :func:`open_engine`."""

    backend = "tensorrt"

    def __init__(
        self, bundle: Bundle, component: str, plan: LoadedPlan, context: _Context, stream: cuda.Stream, pool: Pool
    ) -> None:
        super().__init__(component, bundle.component(component), f"cuda:{pool.index}")
        self._plan, self._context, self._stream = plan, context, stream
        self._pool, self._frees = pool, pool.frees
        self._device: dict[str, cuda.DeviceBuffer] = {}
        self._pinned: dict[str, cuda.PinnedBuffer] = {}
        # The latest last; None where it ran once, and is recorded when it comes again.
        self._runs: OrderedDict[Key, _Recorded | None] = OrderedDict()
        self._records = True
        self._hint = f"compile it for this too: {compile_command(bundle)}"
        pool.enter()

    @property
    def memory_bytes(self) -> int:
        """Memory of the device it holds: weights and buffers. Handles are not its own."""
        return sum(buffer.nbytes for buffer in self._device.values()) + (0 if self._closed else self._plan.memory_bytes)

    def __del__(self) -> None:
        self.close()

    def _upload(self, name: str, array: NDArray[Any], dtype: str) -> Memory:
        self._begin()
        memory = self._pool.allocate(array.size * BY_NAME[dtype].storage.itemsize)
        content = float32_to_bfloat16(array) if dtype == "bfloat16" else np.asarray(array, order="C")
        self._stream.to_device(memory.address, content.ctypes.data, content.nbytes)
        self._stream.synchronize()
        return memory

    def _run(self, feeds: Feeds, keep: Collection[str], sizes: Mapping[str, int]) -> dict[str, Any]:
        self._begin()
        stream = self._stream
        if self._frees != self._pool.frees:
            self._frees = self._pool.frees
            self._forget_freed()
        profile = choose_profile(self.name, self.inputs, self._plan.entry.profiles, sizes, self._hint)
        # All memory is got before anything is queued: where there is too little, nothing has begun.
        shapes: dict[str, Shape] = {name: feeds[name].shape for name in self.inputs}
        fresh = {name: value for name, value in feeds.items() if isinstance(value, np.ndarray)}
        addresses = {name: feeds[name].value.address for name in self.inputs if name not in fresh}
        for name in fresh:
            addresses[name] = self._grow(name, self._nbytes(name, shapes[name])).address
            self._pin(name, self._nbytes(name, shapes[name]))
        key = (profile, tuple((shapes[name], addresses[name]) for name in self.inputs))
        if recorded := self._runs.get(key):
            self._runs.move_to_end(key)
            return self._execute(partial(stream.launch, recorded.graph), fresh, recorded.outputs, keep)
        own = self._own_context() if key in self._runs else None
        context = own or self._context
        context.shape(profile, shapes, stream)
        outputs = {name: context.output_shape(name) for name in self.outputs}
        for name, shape in outputs.items():
            addresses[name] = self._grow(name, self._nbytes(name, shape)).address
        scratch = self._grow(SCRATCH, context.scratch_bytes)
        context.bind(addresses, scratch)
        results = self._execute(partial(context.enqueue, stream), fresh, outputs, keep)
        if own:
            # After a plain run, in which TensorRT settles what new shapes ask for.
            self._record(key, own, outputs, frozenset([*addresses.values(), scratch.address]))
        elif self._records:
            self._runs[key] = None
        while len(self._runs) > MAX_GRAPHS:
            self._forget(next(iter(self._runs)))
        return results

    def _download(self, handle: Handle) -> NDArray[Any]:
        cuda.use(self._pool.index)
        array = np.empty(handle.shape, BY_NAME[handle.dtype].storage)
        cuda.read(handle.value.address, array)
        return bfloat16_to_float32(array) if handle.dtype == "bfloat16" else array

    def _close(self) -> None:
        with contextlib.suppress(BackendError):
            cuda.use(self._pool.index)
        for key in list(self._runs):
            self._forget(key)
        # Contexts go before the engine they are of, and both before the memory they use.
        del self._context
        self._plan.close()
        for buffer in self._device.values():
            buffer.free()
        for pinned in self._pinned.values():
            pinned.free()
        self._device, self._pinned = {}, {}
        self._stream.close()
        self._pool.leave()

    def _begin(self) -> None:
        """Before anything is asked of the GPU or of TensorRT."""
        cuda.use(self._pool.index)
        self._plan.errors.clear()

    def _nbytes(self, name: str, shape: Shape) -> int:
        """Of an input or output of that shape."""
        spec = self.inputs.get(name) or self.outputs[name]
        return math.prod(shape) * BY_NAME[spec.dtype].storage.itemsize

    def _pin(self, name: str, nbytes: int) -> None:
        """See to it that there is pinned memory for an input or output."""
        pinned = self._pinned.get(name)
        if pinned is None or pinned.nbytes < nbytes:
            if pinned:
                self._pinned.pop(name).free()
            self._pinned[name] = cuda.PinnedBuffer(nbytes)

    def _grow(self, name: str, nbytes: int) -> cuda.DeviceBuffer:
        """The device's buffer of that name; another where it is too small."""
        buffer = self._device.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            if buffer:
                self._free(self._device.pop(name))
            buffer = self._device[name] = self._pool.buffer(nbytes)
        return buffer

    def _free(self, buffer: cuda.DeviceBuffer) -> None:
        """Free memory of the device, and forget the runs that used it."""
        for key, recorded in list(self._runs.items()):
            used = recorded.addresses if recorded else {address for _, address in key[1]}
            if buffer.address in used:
                self._forget(key)
        buffer.free()

    def _forget_freed(self) -> None:
        """Forget the runs that read handles whose memory was freed."""
        own = {buffer.address for buffer in self._device.values()}
        for key in list(self._runs):
            if not all(address in own or self._pool.holds(address) for _, address in key[1]):
                self._forget(key)

    def _forget(self, key: Key) -> None:
        if recorded := self._runs.pop(key):
            recorded.graph.close()

    def _execute(
        self,
        enqueue: Callable[[], None],
        fresh: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, Shape],
        keep: Collection[str],
    ) -> dict[str, Any]:
        """Copy inputs in, compute, copy outputs out or aside; wait for it all."""
        stream, sizes = self._stream, {name: self._nbytes(name, shape) for name, shape in outputs.items()}
        kept = {name: self._pool.allocate(sizes[name]) for name in outputs if name in keep}
        for name in outputs.keys() - kept.keys():
            self._pin(name, sizes[name])
        try:
            for name, value in fresh.items():
                staged = self._staged(name, value.shape)
                np.copyto(staged, float32_to_bfloat16(value) if self.inputs[name].dtype == "bfloat16" else value)
                stream.to_device(self._device[name].address, self._pinned[name].address, staged.nbytes)
            enqueue()
            for name, nbytes in sizes.items():
                if name in kept:
                    stream.on_device(kept[name].address, self._device[name].address, nbytes)
                else:
                    stream.to_host(self._pinned[name].address, self._device[name].address, nbytes)
        finally:
            stream.synchronize()
        return {
            name: self._kept(name, shape, kept[name]) if name in kept else self._result(name, shape)
            for name, shape in outputs.items()
        }

    def _staged(self, name: str, shape: Shape) -> NDArray[Any]:
        """The pinned memory of an input or output, as an array of bits where numpy has no such type."""
        spec = self.inputs.get(name) or self.outputs[name]
        return self._pinned[name].view(shape, BY_NAME[spec.dtype].storage)

    def _result(self, name: str, shape: Shape) -> NDArray[np.float32]:
        staged = self._staged(name, shape)
        return bfloat16_to_float32(staged) if self.outputs[name].dtype == "bfloat16" else staged.copy()

    def _own_context(self) -> _Context | None:
        """A context for one run to be recorded; None where there cannot be one."""
        try:
            return _Context(self._plan)
        except BackendError:
            self._record_no_more()
            return None

    def _record(self, key: Key, context: _Context, outputs: dict[str, Shape], addresses: frozenset[int]) -> None:
        """Record the run that ``context`` has just done."""
        try:
            graph = self._stream.capture(partial(context.enqueue, self._stream))
        except BackendError:
            self._record_no_more()
        else:
            self._runs[key] = _Recorded(graph, context, outputs, addresses)

    def _record_no_more(self) -> None:
        """Some plans cannot be recorded, such as those that stream their weights. They run as before."""
        self._records = False
        for key in list(self._runs):
            self._forget(key)
