"""Sessions of ONNX Runtime on a device: inputs and outputs in buffers there, and what its errors mean.

Any provider that has device memory serves: the CUDA provider, and plugins for NVIDIA's GPUs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.base import Feeds
from zimgkit.engines.errors import BackendError, BundleError, OutOfMemoryError, UsageError, ZimgError

if TYPE_CHECKING:
    from zimgkit.engines.bundle import TensorSpec

OUT_OF_MEMORY = ("failed to allocate memory", "out of memory", "bad_alloc", "alloc_failed")
"""What ONNX Runtime, the C++ library and CUDA's libraries say, in lower case."""

CUDA_SAYS = {
    "no cuda-capable device": ("there is no NVIDIA GPU", "use --device cpu with --backend onnxruntime"),
    "driver version is insufficient": ("the NVIDIA driver is too old", "install a newer driver"),
    "invalid device ordinal": ("there is no such GPU", "count from cuda:0"),
}
"""What CUDA says of a GPU it cannot use, in lower case, what that means and what to do."""


class Place(NamedTuple):
    """Where buffers lie, as ONNX Runtime calls it."""

    kind: str
    """``"cpu"``, or ``"cuda"`` for the memory of an NVIDIA GPU, whichever provider runs there."""
    number: int = 0


class BoundSession:
    """A session whose inputs and outputs are bound to buffers in one place.

    What was uploaded is read where it lies. Other inputs, and the outputs, have a buffer each, which is kept as long
    as its shape stays the same. A run waits for the device once, at its end, which the provider does by itself; copies
    to and from the device are finished when they return.

    Args:
        session: an ``onnxruntime.InferenceSession``.
        place: where its inputs and outputs are.
        inputs: of the graph.
        outputs: of the graph.
    """

    def __init__(
        self, session: Any, place: Place, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
    ) -> None:
        self._session, self._place = session, place
        self._inputs, self._outputs = inputs, outputs
        self._binding = session.io_binding()
        self._buffers: dict[str, Any] = {}

    def run(self, feeds: Feeds, options: Any = None) -> dict[str, NDArray[np.float32]]:
        """Run the graph once.

        Args:
            feeds: every input, as an array or as :func:`upload` gave it.
            options: ``onnxruntime.RunOptions``.

        Returns:
            The outputs, as arrays of their own.
        """
        for name, value in feeds.items():
            self._binding.bind_ortvalue_input(name, self._filled(name, value))
        sides = side_lengths(self._inputs, feeds)
        for name, spec in self._outputs.items():
            shape = output_shape(spec, sides)
            if shape is None:
                self._binding.bind_output(name, *self._place)
            else:
                self._binding.bind_ortvalue_output(name, self._buffer(name, shape, spec.dtype))
        self._session.run_with_iobinding(self._binding, options)
        # On the CPU the array would be the buffer itself.
        found = [np.array(value.numpy()) for value in self._binding.get_outputs()]
        return dict(zip(self._outputs, found, strict=True))

    def _filled(self, name: str, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        buffer = self._buffer(name, value.shape, value.dtype.name)
        buffer.update_inplace(value)
        return buffer

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        import onnxruntime as ort

        buffer = self._buffers.get(name)
        if buffer is None or tuple(buffer.shape()) != shape:
            # The old one first, so that both never need memory at once.
            del buffer
            self._buffers.pop(name, None)
            create = ort.OrtValue.ortvalue_from_shape_and_type
            self._buffers[name] = create(list(shape), np.dtype(dtype), *self._place)
        return self._buffers[name]


def upload(feeds: Mapping[str, NDArray[Any]], place: Place) -> dict[str, Any]:
    """Copy arrays to the device, for many runs; they stay there until the last handle is gone."""
    import onnxruntime as ort

    return {
        name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), *place) for name, value in feeds.items()
    }


def side_lengths(inputs: Mapping[str, TensorSpec], feeds: Feeds) -> dict[str, int]:
    """How long the free sides of the inputs are.

    Raises:
        BackendError: two inputs do not agree on a side.
    """
    lengths: dict[str, int] = {}
    for name, value in feeds.items():
        shape = value.shape if isinstance(value, np.ndarray) else getattr(value, "shape", tuple)()
        for side, length in zip(inputs[name].shape, shape, strict=False):
            if isinstance(side, str) and lengths.setdefault(side, length) != length:
                raise BackendError(f"{name!r} is {length} {side} long, and another input is {lengths[side]}")
    return lengths


def output_shape(spec: TensorSpec, sides: Mapping[str, int]) -> tuple[int, ...] | None:
    """The shape of an output, whose sides are numbers, sides of inputs, or multiples of these such as ``"8*height"``.

    Returns:
        None where a side is none of these: only the graph can tell.
    """
    shape = []
    for side in spec.shape:
        if isinstance(side, int):
            shape.append(side)
            continue
        factor, name = re.fullmatch(r"(?:(\d+)\*)?(.*)", side, re.DOTALL).groups()  # type: ignore[union-attr]
        if name not in sides:
            return None
        shape.append(int(factor or 1) * sides[name])
    return tuple(shape)


def explain(error: Exception, what: str, hint: str = "try --backend torch, and report this") -> Exception:
    """What went wrong, as an error for the user.

    Args:
        error: what ONNX Runtime raised.
        what: what it was doing, such as ``"ONNX Runtime failed in denoiser"``.
        hint: what to do about an error that is not known.
    """
    if isinstance(error, ZimgError):
        return error
    text = " ".join(str(error).split())
    lower = text.lower()
    if isinstance(error, MemoryError) or any(sign in lower for sign in OUT_OF_MEMORY):
        return OutOfMemoryError(
            f"{what}: out of memory", "ask for a smaller picture, or use a bundle of lower precision"
        )
    for sign, (meaning, remedy) in CUDA_SAYS.items():
        if sign in lower:
            kind = UsageError if "no such" in meaning else BackendError
            return kind(f"{what}: {meaning}", remedy)
    if "protobuf" in lower or ("external" in lower and "data" in lower):
        return BundleError(f"{what}: {text[:300]}", "copy or build the bundle again")
    return BackendError(f"{what}: {text[:300]}", hint)
