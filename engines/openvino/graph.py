"""A component's graph as OpenVINO reads it: without functions, its weights where they lie in the mapped files.

OpenVINO copies every weight that an ONNX graph has. So it reads them as inputs, whose place constants take that are
views of the files.
"""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import BackendError, BundleError, install
from zimgkit.engines.openvino.api import load
from zimgkit.engines.openvino.rotation import rotate_halves

if TYPE_CHECKING:
    from zimgkit.engines.bundle import Bundle

IN_MEMORY = "*/_ORT_MEM_ADDR_/*"
"""In the place of a file's name: OpenVINO takes the offset for an address.

https://github.com/openvinotoolkit/openvino/blob/master/src/frontends/onnx/frontend/src/utils/tensor_external_data.hpp
"""
SMALL = 1 << 16
"""Bytes of weights that are copied into the graph: it has shapes and scales to be read with."""

WIDENS = "decompression_0"
"""What OpenVINO calls a cast that kernels shall do: it does others once, and keeps all weights in float32."""


class Graph(NamedTuple):
    """An ONNX model, and its weights."""

    model: bytes
    """Its last inputs are ``weights``."""
    weights: dict[str, NDArray[np.uint8]]
    """Name -> its bytes in a mapped file."""
    inputs: list[str]
    """The others."""
    outputs: list[str]
    quantized: str
    """What it has in 8 or 4 bits: ``"inputs"`` of products and weights, ``"weights"`` alone, or nothing."""


def read_graph(bundle: Bundle, file: str) -> Graph:
    """Read one of a bundle's graphs, inline its functions and map its weights.

    OpenVINO takes no functions. Nothing is written: what inlining takes, 20 ms, is not worth a second file that could
    be damaged, or a folder that may be read-only.

    Raises:
        BundleError: the file is no ONNX graph, or points out of its weights.
        BackendError: onnx is not installed.
    """
    try:
        import onnx
        from onnx.inliner import inline_local_functions
    except ImportError:
        raise BackendError("the openvino backend needs onnx", install("openvino")) from None
    path = bundle.file(file)
    broken = BundleError(f"{path} is no graph that zimgkit wrote", "copy or build the bundle again")
    data = path.read_bytes()
    if IN_MEMORY.encode() in data:
        raise broken  # It would make OpenVINO read any address.
    try:
        model = inline_local_functions(onnx.load_from_string(data))
        rotate_halves(model)
        inputs = [value.name for value in model.graph.input]
        files: dict[str, NDArray[np.uint8]] = {}
        weights: dict[str, NDArray[np.uint8]] = {}
        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            entry = {pair.key: pair.value for pair in tensor.external_data}
            name = (PurePosixPath(file).parent / entry["location"]).as_posix()
            if name not in files:
                files[name] = np.memmap(bundle.file(name), np.uint8, "r")
            offset, length = int(entry.get("offset", 0)), int(entry["length"])
            if offset < 0 or length < 0 or offset + length > files[name].size:
                raise broken
            found = files[name][offset : offset + length]
            if length > SMALL:
                weights[tensor.name] = found
                model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
            else:
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")
                tensor.raw_data = found.tobytes()
        kept = [tensor for tensor in model.graph.initializer if tensor.name not in weights]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        return Graph(
            model.SerializeToString(),
            weights,
            inputs,
            [value.name for value in model.graph.output],
            _quantized({node.op_type for node in model.graph.node}),
        )
    except (BundleError, MemoryError, OSError):
        raise  # Mapping a file may take more addresses than there are.
    except Exception:  # Protobuf and the inliner raise many kinds.
        raise broken from None


def _quantized(operators: set[str]) -> str:
    if "QuantizeLinear" in operators:
        return "inputs"
    return "weights" if "DequantizeLinear" in operators else ""


def insert_weights(model: Any, graph: Graph) -> None:
    """Put the weights of a graph in the place of the inputs that stand for them.

    Args:
        model: what OpenVINO has read of it; changed. It and what is compiled of it read ``graph.weights``.
        graph: stays as long as they do.

    Raises:
        BundleError: a weight has another size than the graph says.
    """
    openvino = load()
    for parameter in model.get_parameters():
        name, kind, shape = parameter.get_friendly_name(), parameter.get_element_type(), parameter.get_partial_shape()
        found = graph.weights.get(name)
        if found is None:
            continue
        if 8 * found.size != math.prod(shape.to_shape()) * kind.bitwidth:
            raise BundleError(f"{name} has another size than its graph says", "copy or build the bundle again")
        tensor = openvino.Tensor(found, shape.to_shape(), kind)
        constant = openvino.op.Constant(tensor, shared_memory=True)
        constant.set_friendly_name(name)
        for reader in parameter.output(0).get_target_inputs():
            reader.replace_source_output(constant.output(0))
            if kind == openvino.Type.bf16 and reader.get_node().get_type_name() == "Convert":
                reader.get_node().get_rt_info()[WIDENS] = ""
        model.remove_parameter(parameter)
