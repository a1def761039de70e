"""The graphs of a built bundle: which tensors they take from weight files, and pointing them to other places there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from zimgkit.engines.errors import BundleError
from zimgkit.engines.tensors.dtypes import BY_ONNX
from zimgkit.engines.tensors.safetensors import TensorInfo


def read_graph(path: Path) -> onnx.ModelProto:
    """Read a graph without its weights.

    Raises:
        BundleError: it is no ONNX model.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own
        raise BundleError(f"{path} is not an ONNX model ({error})", "build the bundle again") from None


def initializers(graph: onnx.ModelProto) -> list[str]:
    """The names of the tensors that lie in weight files."""
    external = onnx.TensorProto.EXTERNAL
    return [tensor.name for tensor in graph.graph.initializer if tensor.data_location == external]


def point_to(graph: onnx.ModelProto, places: Mapping[str, TensorInfo], folders: Sequence[Path]) -> None:
    """Change where initializers lie.

    Args:
        graph: the graph.
        places: name of an initializer -> where it lies now, in one of the folders.
        folders: the bundle's as it is and as it will be.

    Raises:
        BundleError: a tensor has another element type or shape than the graph takes.
    """
    for tensor in graph.graph.initializer:
        if (info := places.get(tensor.name)) is None:
            continue
        if _as_stored(tensor) != (info.dtype, info.shape):
            raise BundleError(f"{tensor.name} is {info.dtype} {info.shape}, as the graph has it not", "build it again")
        folder = next(folder for folder in folders if info.file.is_relative_to(folder))
        location = info.file.relative_to(folder).as_posix()
        values = {"location": location, "offset": str(info.offset), "length": str(info.nbytes)}
        for entry in tensor.external_data:
            entry.value = values.pop(entry.key, entry.value)
        for key, value in values.items():
            tensor.external_data.add(key=key, value=value)


def _as_stored(tensor: onnx.TensorProto) -> tuple[str, tuple[int, ...]]:
    """The element type and shape of an initializer in a weight file, where two numbers of four bits share a byte.

    Where a graph takes the bytes of their blocks, (out, blocks, bytes), these are a row of the file.
    """
    if tensor.data_type == onnx.TensorProto.INT4:
        *rows, width = tensor.dims
        return "uint8", (*rows, width // 2)
    if tensor.data_type == onnx.TensorProto.UINT8 and len(tensor.dims) == 3:
        rows, blocks, size = tensor.dims
        return "uint8", (rows, blocks * size)
    return BY_ONNX[tensor.data_type].name, tuple(tensor.dims)
