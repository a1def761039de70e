"""The PyTorch fallback: interprets a component's ONNX graph, so that no second definition of a network exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from zimgkit.engines.base import Feeds, check_feeds
from zimgkit.engines.errors import BackendError, BundleError, UsageError, install

try:
    import torch

    from zimgkit.engines.torch.graph import Program, compile_graph, load, read_constant, run
except ImportError as error:
    raise BackendError(f"the torch backend needs {error.name}", install("torch")) from None

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zimgkit.engines.bundle import Bundle, Component, TensorSpec


def open_engine(bundle: Bundle, component: str, device: str | None = None, compute: str | None = None) -> TorchEngine:
    """Open a component of a bundle with torch.

    On the CPU the float32 graph runs if there is one, elsewhere the one in the bundle's own precision. The weights are
    mapped into memory; on another device they are copied there once.

    Args:
        bundle: an open bundle.
        component: a name in its manifest.
        device: as torch names devices; ``"cuda"`` where there is one, else ``"cpu"``, when not given.
        compute: the element type to compute in, where the bundle has a graph for it.

    Raises:
        UsageError: no such kind of device.
        BundleError: the graph or its weights are broken.
        BackendError: the device is not there or too small, or the graph has an operator that is not covered.
    """
    entry = bundle.component(component)
    place = _device(device)
    if not entry.graphs:
        raise BackendError(f"component {component!r} is a table of tensors and has no graph to run")
    wanted = compute or ("float32" if place.type == "cpu" else bundle.manifest.precision)
    graph = entry.graphs.get(wanted) or next(iter(entry.graphs.values()))
    with torch.inference_mode(), _errors(f"opening {component!r}", place):
        program = compile_graph(load(bundle, graph), partial(read_constant, bundle, graph), place)
    if program.inputs.keys() != entry.inputs.keys() or program.outputs.keys() != entry.outputs.keys():
        raise BundleError(f"{bundle.file(graph)} is not what the manifest describes", "build the bundle again")
    return TorchEngine(component, entry, program, place, graph)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UsageError(f"torch knows no device {name!r}", "use cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"torch finds {torch.cuda.device_count()} CUDA devices"
        raise BackendError(f"device {device} is not there: {found}", "use --device cpu, or a CUDA build of torch")
    return device


class TorchEngine:
    """One compiled graph on one device; see :class:`zimgkit.engines.base.Engine`."""

    def __init__(self, name: str, component: Component, program: Program, device: torch.device, graph: str) -> None:
        self.inputs: Mapping[str, TensorSpec] = component.inputs
        self.outputs: Mapping[str, TensorSpec] = component.outputs
        self.graph = graph
        """The file of the bundle that it runs."""
        self._name = name
        self._program: Program | None = program
        self._device = device

    def upload(self, feeds: Mapping[str, NDArray[Any]]) -> Feeds:
        """Copy inputs to the device, once for many runs."""
        program = self._open()
        with torch.inference_mode(), _errors(f"uploading to {self._name!r}", self._device):
            return {name: self._tensor(program, name, array, copy=True) for name, array in feeds.items()}

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        """Run the graph on all of its inputs, arrays or handles from ``upload``.

        Raises:
            BackendError: an input is missing or misshapen, or memory ran out.
        """
        program = self._open()
        check_feeds(self._name, self.inputs, feeds)
        # By default cuDNN rounds the convolutions of a float32 graph to TF32, ten bits of mantissa.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), exact, _errors(f"running {self._name!r}", self._device):
            found = run(program, {name: self._tensor(program, name, feed) for name, feed in feeds.items()})
            # A copy always: an output may be a view of an input or of a weight.
            order = torch.contiguous_format
            return {
                name: tensor.to("cpu", torch.float32, copy=True, memory_format=order).numpy()
                for name, tensor in found.items()
            }

    def watch(self, watchers: Mapping[str, Callable[[torch.Tensor], None]]) -> None:
        """Show the first input of some nodes to functions, in every run from now on.

        Args:
            watchers: by operator and node, such as ``MatMul 'layers.0/linear_4'``. A node that no output depends on
                never runs, and is not shown.
        """
        self.wrap({label: partial(partial, _watched, watcher) for label, watcher in watchers.items()})

    def wrap(self, wrappers: Mapping[str, Callable[[Callable[..., Any]], Callable[..., Any]]]) -> None:
        """Put other functions in the place of what some nodes call, in every run from now on.

        Args:
            wrappers: by operator and node, as in :meth:`watch`: what makes the new function from the old.
        """
        program = self._open()
        for index, step in enumerate(program.steps):
            if wrapper := wrappers.get(step.label):
                program.steps[index] = step._replace(call=wrapper(step.call))

    def close(self) -> None:
        """Drop the weights. A closed engine cannot run again."""
        self._program = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _open(self) -> Program:
        if self._program is None:
            raise BackendError(f"{self._name!r} was closed", "open it again")
        return self._program

    def _tensor(
        self, program: Program, name: str, feed: NDArray[Any] | torch.Tensor, *, copy: bool = False
    ) -> torch.Tensor:
        if isinstance(feed, torch.Tensor):
            return feed
        writable = torch.from_numpy(np.require(feed, requirements=["C", "W"]))
        return writable.to(self._device, program.dtypes.get(name), copy=copy)


def _watched(watcher: Callable[[torch.Tensor], None], call: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    watcher(inputs[0])
    return call(*inputs)


@contextmanager
def _errors(doing: str, device: torch.device) -> Iterator[None]:
    """Turn what torch raises into one line that says where, and what would help."""
    try:
        yield
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            hint = "make a smaller picture, free the device's memory, or build the bundle in a smaller precision"
            raise BackendError(f"{device} ran out of memory {doing}", hint) from None
        where = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        raise BackendError(f"torch failed {doing}{where}: {str(error).partition(chr(10))[0]}") from None
