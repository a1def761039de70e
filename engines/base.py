"""What a backend must be able to do, how to open one, and what all of them do alike."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from zimgkit.engines.errors import BackendError, BundleError, OutOfMemoryError, UsageError, ZimgError
from zimgkit.engines.shapes import Shape, dimension_sizes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zimgkit.engines.bundle import Bundle, Component, TensorSpec


@dataclass(frozen=True, eq=False, slots=True)
class Handle:
    """A tensor that stays on a device. Its memory is free for others once nobody refers to the handle any more.

    It belongs to the device, not to the engine that made it: every engine of the same backend and device takes it,
    also when that engine is closed.
    """

    backend: str
    device: str
    dtype: str
    """As in a :class:`~zimgkit.engines.bundle.TensorSpec`."""
    shape: Shape
    value: Any
    """The tensor, as the backend has it. Nobody else looks at it, and nobody changes it."""


Feeds = Mapping[str, Any]
"""Input name -> a numpy array, or a :class:`Handle`."""


class Engine(Protocol):
    """One component of a bundle, ready to run on one device.

    Threads may share an engine: they wait for one another. Host arrays are float32, int64 or bool. An input in bfloat16
    is given as float32 and rounded to nearest even, and an output in bfloat16 comes back as float32; as handles they
    stay in bfloat16 where the device computes in it.
    """

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    device: str
    """Where it runs, such as ``"cpu"`` or ``"cuda:0"``."""

    def upload(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, Handle]:
        """Copy inputs that stay the same over many runs to the device, once; the handles go into ``run``.

        Raises:
            BackendError: the engine is closed.
            OutOfMemoryError: the device has too little memory.
        """

    def run(self, feeds: Feeds, keep: Collection[str] = ()) -> dict[str, Any]:
        """Run the graph on all of its inputs.

        Args:
            feeds: every input, as an array or as a handle.
            keep: names of outputs that are to stay on the device.

        Returns:
            All outputs, in the order of ``outputs``: a handle for those in ``keep``, a float32 array of its own for
            others. No later run changes either.

        Raises:
            BackendError: an input is missing or does not fit, ``keep`` names no output, or the engine is closed.
            OutOfMemoryError: the device has too little memory.
        """

    def run_together(self, sets: Sequence[Feeds]) -> list[dict[str, Any]]:
        """Run the graph on several sets of inputs, whose shapes may differ; what it gives is as of ``run``.

        Where weights are copied to the device in every run, they are copied once for all sets.
        """

    def download(self, handle: Handle) -> NDArray[Any]:
        """Copy what a handle stands for to the host: bfloat16 as float32, other element types as they are.

        It asks nothing of the engine but its device, and also serves when the engine is closed.

        Raises:
            BackendError: the handle is of another backend or device.
        """

    def close(self) -> None:
        """Free the device's memory, once a run under way is done. A closed engine cannot run again."""


BACKENDS = {
    "onnxruntime": "zimgkit.engines.onnxruntime.engine",
    "openvino": "zimgkit.engines.openvino.engine",
    "tensorrt": "zimgkit.engines.tensorrt.engine",
    "tensorrt-rtx": "zimgkit.engines.onnxruntime.tensorrt_rtx",
    "torch": "zimgkit.engines.torch.engine",
    "torch-compiled": "zimgkit.engines.torch.compiled",
}
"""Backend name -> the module whose ``open_engine(bundle, component, device)`` opens it."""


def open_engine(bundle: Bundle, component: str, backend: str = "onnxruntime", device: str | None = None) -> Engine:
    """Open one component of a bundle on a backend.

    Args:
        bundle: an open bundle.
        component: a name in ``bundle.manifest.components``, such as ``"denoiser"``.
        backend: one of :data:`BACKENDS`.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, of OpenVINO ``"gpu"`` or ``"npu"``; the best one present when not
            given.

    Raises:
        UsageError: no such backend or device.
        BackendError: the backend is not installed or cannot run this component.
        BundleError: no such component, its graph or weights are broken, or the bundle was changed since it was opened.
    """
    if backend not in BACKENDS:
        raise UsageError(f"no backend is called {backend!r}", f"choose one of {', '.join(BACKENDS)}")
    opener = cast("Callable[[Bundle, str, str | None], Engine]", import_module(BACKENDS[backend]).open_engine)
    try:
        engine = opener(bundle, component, device)
    except ZimgError:
        bundle.check_unchanged(component)
        raise
    try:
        bundle.check_unchanged(component)
    except BundleError:
        engine.close()
        raise
    return engine


class BaseEngine(ABC):
    """The part of an :class:`Engine` that is the same for every backend: checks, handles, and the lock.

    A backend writes the methods with an underscore, which are called with the lock held, on an open engine; all but
    ``_download``, which is called at any time.
    """

    backend: ClassVar[str]
    """Its name in :data:`BACKENDS`."""

    def __init__(self, name: str, component: Component, device: str) -> None:
        self.name = name
        self.inputs: Mapping[str, TensorSpec] = component.inputs
        self.outputs: Mapping[str, TensorSpec] = component.outputs
        self.device = device
        self._lock = threading.Lock()
        self._closed = False

    def upload(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, Handle]:
        """See :meth:`Engine.upload`. What does not fit is found when it is used."""
        with self._open():
            return {name: self._handle(name, array) for name, array in feeds.items()}

    def run(self, feeds: Feeds, keep: Collection[str] = ()) -> dict[str, Any]:
        """See :meth:`Engine.run`."""
        with self._open():
            sizes = check_feeds(self, feeds)
            if unknown := [name for name in keep if name not in self.outputs]:
                message = f"{self.name} has no output {unknown[0]!r} to keep"
                raise BackendError(message, f"it has {', '.join(self.outputs)}")
            return self._run(feeds, keep, sizes)

    def run_together(self, sets: Sequence[Feeds]) -> list[dict[str, Any]]:
        """See :meth:`Engine.run_together`."""
        return [self.run(feeds) for feeds in sets]

    def download(self, handle: Handle) -> NDArray[Any]:
        """See :meth:`Engine.download`."""
        check_handle(self, "a handle", handle)
        return self._download(handle)

    def close(self) -> None:
        """See :meth:`Engine.close`. A second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._close()

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """Hold the lock of an engine that is open."""
        with self._lock:
            if self._closed:
                raise BackendError(f"the engine of {self.name} is closed", "open it again")
            try:
                yield
            except MemoryError:
                hint = "close other programs, or ask for a smaller picture"
                raise OutOfMemoryError(f"the host is out of memory for {self.name}", hint) from None

    def _handle(self, name: str, array: NDArray[Any]) -> Handle:
        from zimgkit.engines.tensors.dtypes import BY_NAME

        dtype = str(array.dtype)
        if dtype == "float32" and name in self.inputs and self.inputs[name].dtype == "bfloat16":
            dtype = "bfloat16"
        if dtype not in BY_NAME:
            raise BackendError(f"{self.name} takes no arrays of {dtype}, such as {name!r}")
        return Handle(self.backend, self.device, dtype, array.shape, self._upload(name, array, dtype))

    def _kept(self, name: str, shape: Shape, value: Any) -> Handle:
        """An output as a handle."""
        return Handle(self.backend, self.device, self.outputs[name].dtype, tuple(shape), value)

    @abstractmethod
    def _upload(self, name: str, array: NDArray[Any], dtype: str) -> Any:
        """Copy an input to the device; what it gives becomes the ``value`` of a handle.

        Args:
            name: of an input, or of none: then it is for another engine.
            array: of any layout.
            dtype: its element type on the device, which is the array's, or ``"bfloat16"`` for one in float32.
        """

    @abstractmethod
    def _run(self, feeds: Feeds, keep: Collection[str], sizes: Mapping[str, int]) -> dict[str, Any]:
        """Run the graph on inputs that were checked, whose dynamic dimensions have these sizes."""

    @abstractmethod
    def _download(self, handle: Handle) -> NDArray[Any]:
        """Copy to the host what a handle of this device stands for."""

    @abstractmethod
    def _close(self) -> None:
        """Give everything back."""


def check_feeds(engine: BaseEngine, feeds: Feeds) -> dict[str, int]:
    """Check names, element types and shapes of all inputs, arrays and handles alike.

    Returns:
        The sizes of the dynamic dimensions.

    Raises:
        BackendError: naming the first input that does not fit.
    """
    import numpy as np

    component, inputs = engine.name, engine.inputs
    if missing := [name for name in inputs if name not in feeds]:
        raise BackendError(f"{component} needs the input {missing[0]!r}")
    if unknown := [name for name in feeds if name not in inputs]:
        raise BackendError(f"{component} has no input {unknown[0]!r}", f"it has {', '.join(inputs)}")
    for name, value in feeds.items():
        if not isinstance(value, np.ndarray):
            check_handle(engine, repr(name), value)
    sizes = dimension_sizes(component, inputs, {name: value.shape for name, value in feeds.items()})
    for name, value in feeds.items():
        wanted, found = inputs[name].dtype, str(value.dtype)
        if isinstance(value, np.ndarray):
            wanted = "float32" if wanted == "bfloat16" else wanted
        if found != wanted:
            raise BackendError(f"{component} takes {name!r} in {wanted}, not {found}")
    return sizes


def check_handle(engine: BaseEngine, name: str, value: Any) -> None:
    """Check that a value is a handle of the engine's own backend and device.

    Raises:
        BackendError: it is not.
    """
    own = f"{engine.backend} on {engine.device}"
    if not isinstance(value, Handle):
        kind = type(value).__name__
        raise BackendError(f"{engine.name} takes {name} as a numpy array, or as a handle of {own}, not as {kind}")
    if (value.backend, value.device) != (engine.backend, engine.device):
        message = f"{engine.name} runs with {own}, and got {name} of {value.backend} on {value.device}"
        raise BackendError(message, "download it there, and give it as an array")
