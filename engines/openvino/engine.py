"""OpenVINO, which computes bfloat16 and 8 bits where the CPU has products for them.

Tested on CPUs alone: Intel GPUs and NPUs are untested.
"""

from __future__ import annotations

import io
import mmap
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from zimgkit.engines.base import BaseEngine, Feeds
from zimgkit.engines.cpu import cpu_flags, lacks_avx2
from zimgkit.engines.errors import BackendError, BundleError, OutOfMemoryError, UsageError, ZimgError, is_out_of_memory
from zimgkit.engines.openvino.activation import activate_before_rounding
from zimgkit.engines.openvino.api import load
from zimgkit.engines.openvino.attention import attend_in_parts
from zimgkit.engines.openvino.feed_forward import ends_in_a_crash, keep_apart
from zimgkit.engines.openvino.graph import Graph, insert_weights, read_graph
from zimgkit.engines.tensors.dtypes import bfloat16_to_float32, float32_to_bfloat16

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zimgkit.engines.base import Handle
    from zimgkit.engines.bundle import Bundle, Component

WHERE = ("Exception from", "Check '", "While validating", "To facilitate")
"""How lines of OpenVINO's messages begin that do not say what was wrong."""
OTHERS = "use --backend onnxruntime"
AS_WRITTEN = {"EXECUTION_MODE_HINT": "ACCURACY"}
"""Every node in the element type that the graph gives it; by default a float32 graph is computed in bfloat16.

https://docs.openvino.ai/2026/openvino-workflow/running-inference/optimize-inference/precision-control.html
"""
COMPILING = 256 << 20
"""Bytes that compiling takes beside weights."""
IN_8_BITS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}
"""Float32, but for products with quantized weights: every 32 numbers of their other input are rounded to 8 bits with a
scale of their own, where the CPU has such products."""
IN_BFLOAT16 = IN_8_BITS | {"INFERENCE_PRECISION_HINT": "bf16"}
"""Likewise, and bfloat16 in the place of float32. A bundle's own graph too, all of it: as it is written, 2026.4 rounds
one in four of what it casts to bfloat16 the wrong way."""


def open_engine(bundle: Bundle, component: str, device: str | None = None) -> OpenVinoEngine:
    """Open a component with OpenVINO.

    Args:
        bundle: an open bundle.
        component: a component that has a graph.
        device: ``"cpu"``, which is the default, ``"gpu"``, ``"gpu:N"`` or ``"npu"``.

    Raises:
        UsageError: no such device.
        BackendError: OpenVINO is not installed or too old, the CPU has no AVX2, the bundle is fp8 and the device a CPU,
            or the graph cannot be compiled.
        OutOfMemoryError: the device has too little memory.
        BundleError: the graph or its weights are broken.
    """
    entry, wanted = bundle.component(component), _parse_device(device or "cpu")
    if not entry.graphs:
        raise BackendError(f"{component} is a table of tensors and has no graph to run")
    if lacks_avx2(cpu_flags()):
        raise BackendError("OpenVINO needs a CPU with AVX2, and this one has none", OTHERS)
    if wanted == "cpu" and bundle.manifest.quantized == "fp8":
        reason = "OpenVINO has no kernels for float8 on CPUs: it would hold all weights in another type"
        raise BackendError(reason, f"{OTHERS}, or build with --precision int8")
    core = load().Core()
    try:
        return OpenVinoEngine(bundle, component, entry, wanted, core)
    except Exception as error:
        raise explain(error, f"OpenVINO cannot load {component}") from None


def _parse_device(device: str) -> str:
    """A device as handles call it: with its number."""
    if device == "cpu":
        return device
    if match := re.fullmatch(r"(gpu|npu)(?::(\d{1,4}))?", device):
        return f"{match[1]}:{int(match[2] or 0)}"
    raise UsageError(f"OpenVINO has no device {device!r}", "choose cpu, gpu, gpu:N or npu")


def _find_device(core: Any, wanted: str) -> str:
    """OpenVINO's name of a device: one alone of its kind may have no number.

    Raises:
        UsageError: it is not there.
    """
    found = [(name.lower().replace(".", ":"), name) for name in core.available_devices]
    present = {_parse_device(known): name for known, name in found if re.match("cpu|gpu|npu", known)}
    if wanted not in present:
        there = ", ".join(present)
        raise UsageError(f"OpenVINO finds no device {wanted} on this machine", f"choose of what there is: {there}")
    return str(present[wanted])


def multiplies_bfloat16(core: Any, place: str) -> bool:
    """Whether a device has products for bfloat16."""
    return "BF16" in core.get_property(place, "OPTIMIZATION_CAPABILITIES")


def _choose_graph(bundle: Bundle, entry: Component, has_bfloat16: bool) -> tuple[Graph, dict[str, str]]:
    """The graph to compile, and how.

    A device that multiplies bfloat16 runs the bundle's own graph, which takes two bytes a weight where the one in
    float32 takes four; others run that one in float32.
    """
    own = next(iter(entry.graphs))
    graph = read_graph(bundle, entry.graphs[own])
    # With quantized inputs 2026.4 takes attention apart, and finds two element types in that of the bundle's own.
    if own != "float32" and has_bfloat16 and graph.quantized != "inputs":
        return graph, IN_BFLOAT16
    if own != "float32" and "float32" in entry.graphs:
        graph = read_graph(bundle, entry.graphs["float32"])
    if own != "float32" and has_bfloat16:
        return graph, IN_BFLOAT16
    return graph, IN_8_BITS if graph.quantized == "weights" else AS_WRITTEN


def _check_room(weights: int) -> None:
    """See whether there are addresses for weights: where it finds none while it compiles, 2026.4 crashes.

    Args:
        weights: their bytes as its kernels read them, which may be two bytes of one.

    Raises:
        OSError: there are none.
    """
    mmap.mmap(-1, COMPILING + weights, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()


def _compile(core: Any, graph: Graph, place: str, config: Mapping[str, str]) -> Any:
    # No cache of compiled models: read back, one of 2026.4 gives NaN; it is a second copy of the weights for a second.
    model = core.read_model(io.BytesIO(graph.model))
    insert_weights(model, graph)
    if place == "CPU":
        attend_in_parts(model)
        activate_before_rounding(model)
        if ends_in_a_crash(config):
            keep_apart(model)
    return core.compile_model(model, place, config)


class OpenVinoEngine(BaseEngine):
    """One compiled model. Use :func:`open_engine`.

    Handles are numpy arrays on every device; bfloat16 as its bit patterns in uint16.
    """

    backend = "openvino"

    def __init__(self, bundle: Bundle, name: str, component: Component, device: str, core: Any) -> None:
        super().__init__(name, component, device)
        place = _find_device(core, device)
        graph, config = _choose_graph(bundle, component, multiplies_bfloat16(core, place))
        if set(graph.inputs) != set(component.inputs) or set(graph.outputs) != set(component.outputs):
            raise BundleError(f"the graph of {name} is not what the manifest describes", "build the bundle again")
        if device == "cpu":
            _check_room(4 * component.parameters if config == AS_WRITTEN else 2 * component.weight_bytes)
        self._graph = graph  # The model reads its weights there.
        self._compile: Callable[[], Any] = partial(_compile, core, graph, place, config)
        self._model: Any = self._compile()
        # Of those that are read: OpenVINO drops the others.
        self._types = {port.get_node().get_friendly_name(): port.element_type for port in self._model.inputs}

    def _upload(self, name: str, array: NDArray[Any], dtype: str) -> NDArray[Any]:
        in_bfloat16 = self._types.get(name) == load().Type.bf16
        return _rounded(array) if in_bfloat16 and dtype == "bfloat16" else np.array(array, order="C")

    def _run(self, feeds: Feeds, keep: Collection[str], sizes: Mapping[str, int]) -> dict[str, Any]:
        try:
            self._model = self._model or self._compile()
            # A request does not keep what it was given alive.
            tensors = [self._tensor(name, feeds[name]) for name in self._types]
            request = self._model.create_infer_request()
            for index, tensor in enumerate(tensors):
                request.set_input_tensor(index, tensor)
            request.infer()
            return {name: self._output(request, name, name in keep) for name in self.outputs}
        except Exception as error:
            # After a run that failed for want of memory, 2026.4 takes the next one for as large.
            self._model = None
            raise explain(error, f"OpenVINO failed in {self.name}") from None

    def _download(self, handle: Handle) -> NDArray[Any]:
        return _widened(handle.value) if handle.value.dtype == np.uint16 else np.array(handle.value)

    def _close(self) -> None:
        del self._model, self._compile, self._graph

    def _tensor(self, name: str, feed: NDArray[Any] | Handle) -> Any:
        """An input where it lies, or a copy in the element type of the graph, which may not be the manifest's."""
        openvino, wanted = load(), self._types[name]
        array = feed if isinstance(feed, np.ndarray) else feed.value
        if wanted == openvino.Type.bf16:
            bits = np.ascontiguousarray(array) if array.dtype == np.uint16 else _rounded(array)
            return openvino.Tensor(bits, openvino.Shape(bits.shape), wanted)
        if array.dtype == np.uint16:
            array = _widened(array)
        return openvino.Tensor(np.require(array, requirements=["C", "W"]), shared_memory=True)

    def _output(self, request: Any, name: str, kept: bool) -> Any:
        """A copy: the request's may be an input or a weight."""
        tensor = request.get_output_tensor(self._graph.outputs.index(name))
        in_bfloat16 = tensor.element_type == load().Type.bf16
        found = tensor.data.view(np.uint16) if in_bfloat16 else tensor.data
        if kept:
            return self._kept(name, found.shape, np.array(found))
        return _widened(found) if in_bfloat16 else np.array(found, np.float32)


def _rounded(array: NDArray[Any]) -> NDArray[np.uint16]:
    return float32_to_bfloat16(np.asarray(array, np.float32))


def _widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return bfloat16_to_float32(bits)


def explain(error: Exception, what: str) -> Exception:
    """What went wrong, as an error for the user.

    Args:
        error: what OpenVINO raised.
        what: what it was doing.
    """
    if isinstance(error, ZimgError):
        return error
    if is_out_of_memory(error):
        return OutOfMemoryError(
            f"{what}: out of memory", "ask for a smaller picture, or use a bundle of lower precision"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(line for line in lines if not line.startswith(WHERE)) or type(error).__name__
    return BackendError(f"{what}: {reason[:300]}", f"{OTHERS}, and report this")
