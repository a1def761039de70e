"""Tensors of ONNX Runtime, called ``OrtValue``: making them on a device, and copying them there and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.shapes import Shape
from zimgkit.engines.tensors.dtypes import BY_NAME, BY_ONNX, bfloat16_to_float32, float32_to_bfloat16

BFLOAT16 = BY_NAME["bfloat16"].onnx
ELEMENT_TYPES = {f"tensor({name})": dtype.onnx for name, dtype in BY_NAME.items()} | {
    "tensor(float)": BY_NAME["float32"].onnx,
    "tensor(double)": BY_NAME["float64"].onnx,
}
"""What ONNX Runtime calls the type of an input or output -> ONNX's number of its element type."""


class Place(NamedTuple):
    """Where buffers lie, as ONNX Runtime calls it."""

    kind: str
    """``"cpu"``, or ``"cuda"`` for an NVIDIA GPU, whichever provider runs there, or ``"cann"`` for an NPU."""
    number: int = 0

    @property
    def device(self) -> str:
        """As :class:`~zimgkit.engines.base.Engine` calls it."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.number}"


def element_types(arguments: Iterable[Any]) -> dict[str, int]:
    """ONNX's numbers of the element types, by name, of the inputs or outputs that a session tells."""
    return {argument.name: ELEMENT_TYPES[argument.type] for argument in arguments}


def empty(shape: Shape, element_type: int, place: Place) -> Any:
    """A tensor whose content is undefined."""
    import onnxruntime as ort

    kind: Any = element_type if element_type == BFLOAT16 else BY_ONNX[element_type].storage
    return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), kind, *place)


def fill(value: Any, array: NDArray[Any]) -> None:
    """Copy an array into a tensor of its shape, and of an element type that may be another."""
    value.update_inplace(_content(array, value.element_type()))


def upload(array: NDArray[Any], dtype: str, place: Place) -> Any:
    """Copy an array of any layout to a device, where it gets another element type, such as ``"bfloat16"``."""
    value = empty(array.shape, BY_NAME[dtype].onnx, place)
    fill(value, array)
    return value


def download(value: Any) -> NDArray[Any]:
    """Copy a tensor to the host: bfloat16 as float32, other element types as they are."""
    if value.element_type() != BFLOAT16:
        return np.array(value.numpy())  # What lies on the host would be the tensor's own memory.
    # Numpy has no such type. Its bits are copied into a tensor around memory of numpy.
    patterns = np.empty(value.shape(), np.uint16)
    _around(patterns, BFLOAT16).update_inplace(value)
    return bfloat16_to_float32(patterns)


def on_host(array: NDArray[Any], element_type: int) -> Any:
    """A tensor around the array's own memory, or around a copy where it must be rounded or put in order."""
    return _around(_content(array, element_type), element_type)


def converted(value: Any, element_type: int, place: Place) -> Any:
    """The tensor itself, or where it has another element type, a copy that went through the host."""
    if value.element_type() == element_type:
        return value
    return upload(download(value), BY_ONNX[element_type].name, place)


def _content(array: NDArray[Any], element_type: int) -> NDArray[Any]:
    """An array's bytes as that element type has them."""
    if element_type == BFLOAT16:
        return float32_to_bfloat16(np.asarray(array, np.float32))
    return np.asarray(array, BY_ONNX[element_type].storage, order="C")


def _around(array: NDArray[Any], element_type: int) -> Any:
    import onnxruntime as ort

    if element_type == BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)
