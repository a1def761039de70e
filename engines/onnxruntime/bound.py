"""Sessions of ONNX Runtime on a device: inputs and outputs in buffers there, and what its errors mean.

Any provider that has device memory serves: the CUDA provider, and plugins for NVIDIA's GPUs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from zimgkit.engines.base import Feeds
from zimgkit.engines.errors import BackendError, BundleError, OutOfMemoryError, UsageError, ZimgError, is_out_of_memory
from zimgkit.engines.onnxruntime.values import Place, converted, element_types, empty, fill
from zimgkit.engines.shapes import Shape, output_shape

if TYPE_CHECKING:
    from zimgkit.engines.bundle import TensorSpec

CUDA_SAYS = {
    "no cuda-capable device": ("there is no NVIDIA GPU", "use --device cpu with --backend onnxruntime"),
    "driver version is insufficient": ("the NVIDIA driver is too old", "install a newer driver"),
    "invalid device ordinal": ("there is no such GPU", "count from cuda:0"),
}
"""What CUDA says of a GPU it cannot use, in lower case, what that means and what to do."""


class BoundSession:
    """A session whose inputs and outputs are bound to buffers in one place.

    Handles are read where they lie. Other inputs, and the outputs, have a buffer each, which is kept as long as its
    shape stays the same; outputs that are to stay on the device have a new one each time. A run waits for the device
    once, at its end, which the provider does by itself; copies to and from the device are finished when they return.

    One thread at a time: the buffers are shared.

    Args:
        session: an ``onnxruntime.InferenceSession``.
        place: where its inputs and outputs are.
        outputs: of the graph.
    """

    def __init__(self, session: Any, place: Place, outputs: Mapping[str, TensorSpec]) -> None:
        self._session, self._place, self._outputs = session, place, outputs
        self._types = element_types([*session.get_inputs(), *session.get_outputs()])
        self._binding = session.io_binding()
        self._buffers: dict[str, Any] = {}

    def run(self, feeds: Feeds, keep: Collection[str], sizes: Mapping[str, int], options: Any = None) -> dict[str, Any]:
        """Run the graph once.

        Args:
            feeds: every input, as an array or as a handle.
            keep: outputs that no later run may change.
            sizes: of the inputs' dynamic dimensions.
            options: ``onnxruntime.RunOptions``.

        Returns:
            The outputs, on the device. Those that are not in ``keep`` are valid until the next run.
        """
        try:
            for name, value in feeds.items():
                self._binding.bind_ortvalue_input(name, self._input(name, value))
            for name, spec in self._outputs.items():
                shape = output_shape(spec, sizes)
                if shape is None:
                    self._binding.bind_output(name, *self._place)
                elif name in keep:
                    self._binding.bind_ortvalue_output(name, empty(shape, self._types[name], self._place))
                else:
                    self._binding.bind_ortvalue_output(name, self._buffer(name, shape))
            self._session.run_with_iobinding(self._binding, options)
            return dict(zip(self._outputs, self._binding.get_outputs(), strict=True))
        finally:
            # What is bound is held, and handles are to be free once others drop them.
            self._binding.clear_binding_inputs()
            self._binding.clear_binding_outputs()

    def _input(self, name: str, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return converted(value.value, self._types[name], self._place)
        buffer = self._buffer(name, value.shape)
        fill(buffer, value)
        return buffer

    def _buffer(self, name: str, shape: Shape) -> Any:
        buffer = self._buffers.get(name)
        if buffer is None or tuple(buffer.shape()) != shape:
            # The old one first, so that both never need memory at once.
            del buffer
            self._buffers.pop(name, None)
            self._buffers[name] = empty(shape, self._types[name], self._place)
        return self._buffers[name]


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
    if is_out_of_memory(error):
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
