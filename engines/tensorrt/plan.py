"""TensorRT plans of a bundle: which one fits this machine, and loading it."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from zimgkit.engines.bundle import Bundle, CompiledEngine
from zimgkit.engines.errors import BackendError, BundleError, OutOfMemoryError, says_out_of_memory
from zimgkit.engines.tensorrt import api as tensorrt_api
from zimgkit.engines.tensorrt import cuda
from zimgkit.engines.tensorrt.cuda import SMALLER
from zimgkit.engines.tensors import safetensors

BACKEND = "tensorrt"
DTYPES = {"float32": "FLOAT", "bfloat16": "BF16", "int64": "INT64", "bool": "BOOL"}
"""Element types of the inputs and outputs of a bundle's graphs, and TensorRT's names of them."""
WEIGHTS = {"float32": "FLOAT", "bfloat16": "BF16"}
"""Likewise of weights that can be exchanged."""

RESERVED = 256 << 20
"""Bytes of a GPU that streamed weights leave for inputs, outputs and what else a run takes."""


def compile_command(bundle: Bundle) -> str:
    """What a user types to get plans for the machine they are on."""
    return f"zimg-export compile {bundle.root} --backend {BACKEND}"


def choose_plan(bundle: Bundle, component: str, compiler: str, version: str, architecture: str) -> CompiledEngine:
    """The bundle's plan of a component for this machine; one made for the very architecture, rather than for any.

    Args:
        bundle: an open bundle.
        component: a component that has a graph.
        compiler: the installed module, such as ``"tensorrt"``.
        version: of that module.
        architecture: of the GPU, such as ``"sm90"``.

    Raises:
        BackendError: none fits, or the one that does was compiled from another graph or other weights.
    """
    plans = bundle.engines(component, BACKEND)
    hint = f"compile it here: {compile_command(bundle)}"
    if not plans:
        raise BackendError(f"{bundle.root} has no TensorRT engine of {component}", hint)
    fitting = [p for p in plans if (p.compiler, p.version) == (compiler, version) and p.device in (architecture, "any")]
    if not fitting:
        made = ", ".join(dict.fromkeys(f"{p.compiler} {p.version} on {p.device}" for p in plans))
        here = f"this machine has {compiler} {version} on {architecture}"
        raise BackendError(f"the TensorRT engines of {component} are for {made}; {here}", hint)
    source = bundle.source_hash(component)
    fresh = [plan for plan in fitting if plan.serves == source]
    if not fresh:
        message = f"the TensorRT engine of {component} was compiled from another graph or other weights than it has now"
        raise BackendError(message, hint)
    return min(fresh, key=lambda plan: plan.device == "any")


def streaming_budget(entry: CompiledEngine, weights: int, free: int) -> int:
    """How many bytes of a plan's weights stay on the GPU; the others are copied there in every run.

    https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/weight-streaming.html

    Args:
        entry: the plan's.
        weights: bytes that can be streamed.
        free: bytes of the GPU that are free, before its weights are there.
    """
    room = max(0, free - entry.memory_bytes - RESERVED)
    wanted = weights if entry.weight_streaming_budget is None else entry.weight_streaming_budget
    return min(weights, wanted, room)


class LoadedPlan:
    """A plan, loaded: its weights are on the current GPU. Free it with :meth:`close`.

    Raises:
        OutOfMemoryError: the GPU has too little memory for it.
        BackendError: TensorRT refuses it.
        BundleError: its inputs or outputs are not the component's.
    """

    def __init__(self, trt: ModuleType, bundle: Bundle, entry: CompiledEngine) -> None:
        self._trt = trt
        self._log = tensorrt_api.make_logger(trt)
        self.errors: list[str] = self._log.errors
        """What TensorRT complained of since it was last cleared."""
        self._hint = f"compile it again: {compile_command(bundle)}"
        self.entry = entry
        self._engine: Any = None
        try:
            self._runtime: Any = trt.Runtime(self._log)
        except (TypeError, RuntimeError):  # Its binding's way to say that there is none.
            raise self.refusal("start") from None
        path = bundle.file(entry.file)
        with path.open("rb") as file:
            try:
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise BundleError(f"{path} is empty", self._hint) from None
            with view:
                self._engine = self._runtime.deserialize_cuda_engine(view)
        if self._engine is None:
            raise self.refusal(f"load {path}")
        if entry.stripped:
            self._fill(bundle)
        elif entry.refit:
            self._refit(bundle, entry.refit.tensors)
        self._check_ends(bundle, path.name)
        budget = None
        if entry.streamable or entry.weight_streaming_budget is not None:
            # Its weights are not on the GPU yet; contexts, which there are none of, would forbid to set it.
            budget = streaming_budget(entry, self._engine.streamable_weights_size, cuda.memory()[0])
            self._engine.weight_streaming_budget_v2 = budget
        stored = bundle.component(entry.component).weight_bytes if entry.stripped else path.stat().st_size
        self.memory_bytes = stored if budget is None else min(stored, budget)
        """Device memory of its weights, for which the size of the plan is taken."""

    def context(self) -> Any:
        """A new execution context, which computes in scratch memory that it is given.

        Raises:
            OutOfMemoryError: the GPU has too little memory.
            BackendError: TensorRT refuses.
        """
        trt = self._trt
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if tensorrt_api.name(trt) == "tensorrt_rtx":
            # It would start with kernels for any shape and compile better ones meanwhile: a graph would keep the first.
            # https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/work-with-dynamic-shapes.html
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        context = self._engine.create_execution_context(config)
        if context is None:
            raise self.refusal(f"prepare {self.entry.component}")
        return context

    def refusal(self, what: str) -> BackendError:
        """Why TensorRT did not do as asked, in its own words."""
        said = self.errors[:]
        self.errors.clear()
        if says_out_of_memory(" ".join(said)):
            return OutOfMemoryError(f"TensorRT cannot {what}: the GPU is out of memory", SMALLER)
        # The first error is the cause, those after it are its consequences.
        return BackendError(f"TensorRT cannot {what}: {said[0][:600] if said else 'it gives no reason'}", self._hint)

    def close(self) -> None:
        """Free the weights; contexts must be gone."""
        self._engine = None
        self._runtime = None

    def _refit(self, bundle: Bundle, names: Iterable[str]) -> None:
        """Exchange some of a plan's weights for the bundle's, and those that TensorRT needs along with them."""
        trt, component = self._trt, self.entry.component
        refitter = trt.Refitter(self._engine, self._log)
        tensors = bundle.tensors(component)
        given: dict[str, NDArray[Any]] = {}  # Mapped, until TensorRT has taken them.
        missing = set(names)
        while missing:
            for name in sorted(missing):
                info = tensors.get(name)
                if info is None or info.dtype not in WEIGHTS:
                    message = f"the TensorRT engine of {component} cannot take {name or 'a weight'!r} from the bundle"
                    raise BackendError(message, self._hint)
                data = given[name] = safetensors.view(info)
                weights = trt.Weights(getattr(trt.DataType, WEIGHTS[info.dtype]), data.ctypes.data, data.size)
                if not refitter.set_named_weights(name, weights):
                    raise self.refusal(f"give the engine of {component} the bundle's {name}")
            missing = set(refitter.get_missing_weights()) - given.keys()
        if not refitter.refit_cuda_engine():
            raise self.refusal(f"give the engine of {component} the bundle's weights")

    def _fill(self, bundle: Bundle) -> None:
        """Fill a plan without weights with the bundle's, which are mapped, not read."""
        component = self.entry.component
        refitter = self._trt.Refitter(self._engine, self._log)
        parser = self._trt.OnnxParserRefitter(refitter, self._log)
        graph = bundle.file(next(iter(bundle.component(component).graphs.values())))
        tensors = bundle.tensors(component)
        weights = {name: safetensors.view(tensors[name]) for name in refitter.get_all_weights() if name in tensors}
        taken = parser.load_model_proto(graph.read_bytes(), str(graph))
        for name, data in weights.items():
            taken = taken and parser.load_initializer(name, data.ctypes.data, data.nbytes)
        if not (taken and parser.refit_model_proto() and refitter.refit_cuda_engine()):
            raise self.refusal(f"fill the engine of {component} with the bundle's weights")

    def _check_ends(self, bundle: Bundle, file: str) -> None:
        """Whether what goes in and comes out, as the plan has it, is what the manifest says."""
        engine, modes, component = self._engine, self._trt.TensorIOMode, bundle.component(self.entry.component)
        found = {
            name: (engine.get_tensor_mode(name) == modes.INPUT, engine.get_tensor_dtype(name).name)
            for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
            if engine.get_tensor_location(name) == self._trt.TensorLocation.DEVICE
        }
        wanted = {name: (True, DTYPES.get(spec.dtype)) for name, spec in component.inputs.items()}
        wanted |= {name: (False, DTYPES.get(spec.dtype)) for name, spec in component.outputs.items()}
        if found != wanted or engine.num_optimization_profiles != max(1, len(self.entry.profiles)):
            raise BundleError(f"{file} is not what the manifest of {bundle.root} describes", self._hint)
