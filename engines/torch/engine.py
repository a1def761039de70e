"""The PyTorch fallback: interprets a component's ONNX graph, so that no second definition of a network exists."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from zimgkit.engines.base import BaseEngine, Feeds, Handle, check_feeds
from zimgkit.engines.errors import BackendError, BundleError, OutOfMemoryError, UsageError, install, is_out_of_memory

try:
    import torch

    from zimgkit.engines.torch import layers
    from zimgkit.engines.torch.graph import Program, compile_graph, load, read_constant, run_together
    from zimgkit.engines.torch.operators import use_kernels
    from zimgkit.engines.torch.quantized import multiplied_types, multiply_in_8_bits
    from zimgkit.engines.torch.runners import Runners
    from zimgkit.engines.torch.streaming import stays_on_host, stream_weights
except ImportError as error:
    raise BackendError(f"the torch backend needs {error.name}", install("torch")) from None

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zimgkit.engines.bundle import Bundle, Component


def open_engine(
    bundle: Bundle, component: str, device: str | None = None, compute: str | None = None, *, compiled: bool = False
) -> TorchEngine:
    """Open a component of a bundle with torch.

    The graph in the bundle's own precision runs, but on a CPU without units that multiply bfloat16: there it is the one
    in float32, if there is one. The weights are mapped into memory; on another device they are copied there once.

    Args:
        bundle: an open bundle.
        component: a name in its manifest.
        device: as torch names devices; ``"cuda"`` where there is one, else ``"cpu"``, when not given.
        compute: the element type to compute in, where the bundle has a graph for it.
        compiled: whether its blocks go through ``torch.compile``, each kind once, in the first run.

    Raises:
        UsageError: no such kind of device.
        BundleError: the graph or its weights are broken.
        BackendError: the device is not there, or the graph has an operator that is not covered.
        OutOfMemoryError: the device has too little memory.
    """
    entry = bundle.component(component)
    place = find_device(device)
    if not entry.graphs:
        raise BackendError(f"component {component!r} is a table of tensors and has no graph to run")
    widens = place.type == "cpu" and not layers.PRODUCTS_IN_BFLOAT16
    wanted = compute or ("float32" if widens else bundle.manifest.precision)
    computes = wanted if wanted in entry.graphs else next(iter(entry.graphs))
    graph = entry.graphs[computes]
    with torch.inference_mode(), _errors(f"opening {component!r}", place):
        room = bundle.weights_budget if place.type != "cpu" else None
        room = None if room is None or room >= entry.weight_bytes else room
        stays = None if room is None else stays_on_host
        model = load(bundle, graph)
        # torch.compile makes kernels of its own, and stops at ours.
        operators = {} if compiled else use_kernels(model, place, computes)
        program = compile_graph(model, partial(read_constant, bundle, graph), place, operators, stays)
        program = multiply_in_8_bits(program, multiplied_types(place))
        if room is not None:
            program = stream_weights(program, room, place)
    if program.inputs.keys() != entry.inputs.keys() or program.outputs.keys() != entry.outputs.keys():
        raise BundleError(f"{bundle.file(graph)} is not what the manifest describes", "build the bundle again")
    kind = CompiledTorchEngine if compiled else TorchEngine
    return kind(component, entry, program, place, graph, streams=room is not None)


def find_device(name: str | None) -> torch.device:
    """The device of this name, with its number; ``cuda`` where there is one, else ``cpu``, when not given.

    Raises:
        UsageError: no such kind of device.
        BackendError: it is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UsageError(f"torch knows no device {name!r}", "use cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"torch finds {torch.cuda.device_count()} CUDA devices"
        raise BackendError(f"device {device} is not there: {found}", "use --device cpu, or a CUDA build of torch")
    if device.type == "cuda":
        return torch.device("cuda", device.index or 0)
    return torch.device("cpu") if device.type == "cpu" else device


class TorchEngine(BaseEngine):
    """One compiled graph on one device; see :class:`zimgkit.engines.base.Engine`."""

    backend = "torch"
    compiled = False
    hint = ""
    """What helps where a run fails."""

    def __init__(
        self,
        name: str,
        component: Component,
        program: Program,
        device: torch.device,
        graph: str,
        *,
        streams: bool = False,
    ) -> None:
        super().__init__(name, component, str(device))
        self.graph = graph
        """The file of the bundle that it runs."""
        self._program = program
        self._place = device
        self._streams = streams
        # What copies weights in every run is neither traced nor recorded.
        recorded = device.type == "cuda" and not streams
        self._runners = Runners(program, compiled=self.compiled and not streams, recorded=recorded)

    def watch(self, watchers: Mapping[str, Callable[[torch.Tensor], None]]) -> None:
        """Show the first input of some nodes to functions, in every run from now on.

        Args:
            watchers: by operator and node, such as ``MatMul 'layers.0/linear_4'``. A node that no output depends on
                never runs, and is not shown.
        """
        self.wrap({label: partial(partial, _watched, watcher) for label, watcher in watchers.items()})

    def wrap(self, wrappers: Mapping[str, Callable[[Callable[..., Any]], Callable[..., Any]]]) -> None:
        """Put other functions in the place of what some nodes call, in every run from now on, step by step.

        Args:
            wrappers: by operator and node, as in :meth:`watch`: what makes the new function from the old.
        """
        with self._open():
            steps = self._program.steps
            for index, step in enumerate(steps):
                if wrapper := wrappers.get(step.label):
                    steps[index] = step._replace(call=wrapper(step.call))
            self._runners = Runners(self._program)

    def _upload(self, name: str, array: NDArray[Any], dtype: str) -> torch.Tensor:
        with torch.inference_mode(), _errors(f"uploading to {self.name!r}", self._place):
            return self._tensor(name, array, copy=True)

    def _run(self, feeds: Feeds, keep: Collection[str], sizes: Mapping[str, int]) -> dict[str, Any]:
        with self._running():
            return self._given(self._runners(self._tensors(feeds)), keep)

    def run_together(self, sets: Sequence[Feeds]) -> list[dict[str, Any]]:
        """See :meth:`zimgkit.engines.base.Engine.run_together`."""
        if not self._streams:
            return super().run_together(sets)
        with self._open():
            for feeds in sets:
                check_feeds(self, feeds)
            with self._running():
                found = run_together(self._program, [self._tensors(feeds) for feeds in sets])
                return [self._given(results, ()) for results in found]

    @contextmanager
    def _running(self) -> Iterator[None]:
        # By default cuDNN rounds the convolutions of a float32 graph to TF32, ten bits of mantissa.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), exact, _errors(f"running {self.name!r}", self._place, self.hint):
            yield

    def _tensors(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        return {name: self._tensor(name, feed) for name, feed in feeds.items()}

    def _given(self, found: Mapping[str, torch.Tensor], keep: Collection[str]) -> dict[str, Any]:
        """Copies of outputs, always: one may be a view of an input or of a weight."""
        order = torch.contiguous_format
        return {
            name: self._kept(name, tuple(tensor.shape), tensor.clone(memory_format=order))
            if name in keep
            else tensor.to("cpu", torch.float32, copy=True, memory_format=order).numpy()
            for name, tensor in ((name, found[name]) for name in self.outputs)
        }

    def _download(self, handle: Handle) -> NDArray[Any]:
        tensor: torch.Tensor = handle.value
        with torch.inference_mode(), _errors(f"downloading from {self.name!r}", self._place):
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            return tensor.to("cpu", dtype, copy=True).numpy()

    def _close(self) -> None:
        """Drop the weights."""
        del self._program, self._runners
        if self._place.type == "cuda":
            torch.cuda.empty_cache()

    def _tensor(self, name: str, feed: NDArray[Any] | Handle, *, copy: bool = False) -> torch.Tensor:
        """An input where the graph takes it, in the element type of the graph, which may not be the manifest's."""
        if isinstance(feed, Handle):
            tensor: torch.Tensor = feed.value
            return tensor.to(self._program.dtypes[name])
        writable = torch.from_numpy(np.require(feed, requirements=["C", "W"]))
        return writable.to(self._place, self._program.dtypes.get(name), copy=copy)


class CompiledTorchEngine(TorchEngine):
    """Likewise, its blocks compiled by ``torch.compile``."""

    backend = "torch-compiled"
    compiled = True
    hint = "use --backend torch, which needs none"


def _watched(watcher: Callable[[torch.Tensor], None], call: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    watcher(inputs[0])
    return call(*inputs)


@contextmanager
def _errors(doing: str, device: torch.device, hint: str = "") -> Iterator[None]:
    """Turn what torch raises into one line that says where, and what would help."""
    try:
        yield
    except (RuntimeError, IndexError, TypeError, ValueError, MemoryError) as error:
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # They hold tensors that filled the memory.
            smaller = "make a smaller picture, free the device's memory, or build the bundle in a smaller precision"
            raise OutOfMemoryError(f"{device} ran out of memory {doing}", smaller) from None
        where = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        reason = str(getattr(error, "inner_exception", error)).partition("\n")[0]  # Of torch.compile, what it met.
        raise BackendError(f"torch failed {doing}{where}: {reason}", hint) from None
