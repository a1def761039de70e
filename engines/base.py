"""What a backend must be able to do, and how to open one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from zimgkit.engines.errors import BackendError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from zimgkit.engines.bundle import Bundle, TensorSpec

Feeds = Mapping[str, Any]
"""Input name -> a numpy array, or a handle that ``Engine.upload`` gave."""


class Engine(Protocol):
    """One component of a bundle, ready to run on one device."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    def upload(self, feeds: Mapping[str, NDArray[Any]]) -> Feeds:
        """Bring inputs that stay the same over many runs to the device, once; the result goes into ``run``."""

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        """Run the graph on all of its inputs; float32, int64 or bool arrays in, float32 arrays out.

        Raises:
            BackendError: an input is missing or misshapen, or the device ran out of memory.
        """

    def close(self) -> None:
        """Free the device's memory. A closed engine cannot run again."""


BACKENDS = {
    "onnxruntime": "zimgkit.engines.onnxruntime.engine",
    "tensorrt": "zimgkit.engines.tensorrt.engine",
    "tensorrt-rtx": "zimgkit.engines.onnxruntime.tensorrt_rtx",
    "torch": "zimgkit.engines.torch.engine",
}
"""Backend name -> the module whose ``open_engine(bundle, component, device)`` opens it."""


def open_engine(bundle: Bundle, component: str, backend: str = "onnxruntime", device: str | None = None) -> Engine:
    """Open one component of a bundle on a backend.

    Args:
        bundle: an open bundle.
        component: a name in ``bundle.manifest.components``, such as ``"denoiser"``.
        backend: one of :data:`BACKENDS`.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; the best one present when not given.

    Raises:
        UsageError: no such backend or device.
        BackendError: the backend is not installed or cannot run this component.
        BundleError: no such component, or its graph or weights are broken.
    """
    if backend not in BACKENDS:
        raise UsageError(f"no backend is called {backend!r}", f"choose one of {', '.join(BACKENDS)}")
    opener = cast("Callable[[Bundle, str, str | None], Engine]", import_module(BACKENDS[backend]).open_engine)
    return opener(bundle, component, device)


def check_feeds(component: str, inputs: Mapping[str, TensorSpec], feeds: Feeds) -> None:
    """Check the names of all inputs, and element types and shapes of those given as numpy arrays.

    Raises:
        BackendError: naming the first input that does not fit.
    """
    import numpy as np

    if missing := [name for name in inputs if name not in feeds]:
        raise BackendError(f"{component} needs the input {missing[0]!r}")
    if unknown := [name for name in feeds if name not in inputs]:
        raise BackendError(f"{component} has no input {unknown[0]!r}", f"it has {', '.join(inputs)}")
    for name, value in feeds.items():
        spec = inputs[name]
        if not isinstance(value, np.ndarray):
            continue
        sides = zip(spec.shape, value.shape, strict=False)
        if len(spec.shape) != value.ndim or any(isinstance(want, int) and want != side for want, side in sides):
            raise BackendError(f"{component} takes {name!r} in the shape {spec.shape}, not {value.shape}")
        if value.dtype.name != spec.dtype or not value.dtype.isnative:
            raise BackendError(f"{component} takes {name!r} in {spec.dtype}, not {value.dtype}")
