"""A component's graph as OpenVINO reads it: without functions, its weights where they lie in the mapped files."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import BackendError, BundleError, install

if TYPE_CHECKING:
    from zimgkit.engines.bundle import Bundle

IN_MEMORY = "*/_ORT_MEM_ADDR_/*"
"""In the place of a file's name: the offset is an address. As ONNX Runtime hands graphs to OpenVINO.

https://github.com/openvinotoolkit/openvino/blob/master/src/frontends/onnx/frontend/src/utils/tensor_external_data.hpp
"""


class Graph(NamedTuple):
    """An ONNX model, and what it refers to."""

    model: bytes
    """It has the addresses of weights: good for this process, while ``weights`` are mapped."""
    weights: dict[str, NDArray[np.uint8]]
    """File -> its bytes, mapped."""
    inputs: list[str]
    outputs: list[str]
    quantized: str
    """What it has in 8 or 4 bits: ``"inputs"`` of products and weights, ``"weights"`` alone, or nothing."""


def read_graph(bundle: Bundle, file: str) -> Graph:
    """Read one of a bundle's graphs, inline its functions and map its weights.

    OpenVINO takes no functions, and no weights from outside a graph's folder. Nothing is written: what inlining takes,
    20 ms, is not worth a second file that could be damaged, or a folder that may be read-only.

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
        weights: dict[str, NDArray[np.uint8]] = {}
        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            entry = {pair.key: pair.value for pair in tensor.external_data}
            name = (PurePosixPath(file).parent / entry["location"]).as_posix()
            if name not in weights:
                weights[name] = np.memmap(bundle.file(name), np.uint8, "r")
            offset, length = int(entry.get("offset", 0)), int(entry["length"])
            if offset < 0 or length < 0 or offset + length > weights[name].size:
                raise broken
            address = weights[name].ctypes.data + offset
            del tensor.external_data[:]
            for key, value in (("location", IN_MEMORY), ("offset", address), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
        return Graph(
            model.SerializeToString(),
            weights,
            [value.name for value in model.graph.input],
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
