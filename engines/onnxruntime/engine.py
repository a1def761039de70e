"""ONNX Runtime: the default on the CPU, and the CUDA or the CANN provider where one is present.

On CUDA: never run on a GPU so far. Of onnxruntime-gpu 1.31 it is known which kernels it has. A bfloat16 bundle's text
encoder, conditioner and denoiser have all of theirs, ``Attention``, ``RMSNormalization`` and ``RotaryEmbedding``
included; its VAE lacks ``Resize``, and runs its float32 graph on the same weights.

On CANN, Huawei's Ascend: untested, only its imitation was run. It goes the way of CUDA, with operators one by one.

No CUDA graph is recorded. One holds for fixed shapes and addresses, while prompts differ in length and the two branches
of guidance bind inputs of their own; and a step of these networks is thousands of large kernels, not many small ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.base import BaseEngine, Feeds, Handle
from zimgkit.engines.bundle import CPU_GRAPH
from zimgkit.engines.cpu import adds_integers_exactly
from zimgkit.engines.errors import BackendError, UsageError
from zimgkit.engines.onnxruntime.bound import BoundSession, explain
from zimgkit.engines.onnxruntime.graph import given
from zimgkit.engines.onnxruntime.values import Place, converted, download, element_types, on_host, upload
from zimgkit.engines.tensors.dtypes import BY_ONNX

if TYPE_CHECKING:
    from zimgkit.engines.bundle import Bundle, Component

CUDA = "CUDAExecutionProvider"
CUDA_OPTIONS = {
    # Float32 is float32, as on the CPU.
    "use_tf32": "0",
    # The default times every algorithm anew for each shape; cuDNN's guess with all the scratch it wants is as good.
    "cudnn_conv_algo_search": "HEURISTIC",
    "cudnn_conv_use_max_workspace": "1",
    # The default grows by powers of two: gigabytes that nobody asked for.
    "arena_extend_strategy": "kSameAsRequested",
}
"""https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html"""

CANN = "CANNExecutionProvider"
CANN_OPTIONS = {
    # The default computes all in float16, which these networks overflow.
    "precision_mode": "must_keep_origin_dtype",
    # A graph is compiled for fixed shapes, while prompts differ in length.
    "enable_cann_graph": "0",
    "arena_extend_strategy": "kSameAsRequested",
}
"""https://onnxruntime.ai/docs/execution-providers/community-maintained/CANN-ExecutionProvider.html"""
PROVIDERS = {"cuda": (CUDA, CUDA_OPTIONS), "cann": (CANN, CANN_OPTIONS)}
"""Kind of device -> what runs there, and its options."""

FOLDING = "ConstantFolding"
"""What ONNX Runtime calls the pass that computes what does not depend on the inputs."""
FOLDED_AT_MOST = "optimization.constant_folding_max_output_size_in_bytes"
FOLDED = 1 << 29
"""As many bytes of float32 weights a component may have for that."""
FUSIONS = "QDQSelectorActionTransformer"
"""What ONNX Runtime calls the pass that turns quantized neighbours into one operator. For float8 it makes one that has
no kernel."""

EXACT = {"session.x64quantprecision": "1"}
"""Without it, processors that lack VNNI add products of 8 bits in 16, which overflow; those that have it it slows."""
SESSION = {
    # By default it rounds inputs to 8 bits where weights alone are said to be rounded.
    "int8-dynamic": {"session.qdq_matmulnbits_accuracy_level": "1"},
    "int8-weights": {"session.qdq_matmulnbits_accuracy_level": "1"},
    "int4-weights": {"session.qdq_matmulnbits_accuracy_level": "1"},
}
"""Precision of what is quantized -> what a session needs then, to compute what its graph says.

https://github.com/microsoft/onnxruntime/blob/main/include/onnxruntime/core/session/onnxruntime_session_options_config_keys.h
"""
NO_KERNEL = ("not_implemented", "provider type for ")
"""What ONNX Runtime says, in lower case, of a node that no provider has a kernel for."""


def open_engine(bundle: Bundle, component: str, device: str | None = None) -> OnnxRuntimeEngine:
    """Open a component on ONNX Runtime.

    Args:
        bundle: an open bundle.
        component: a component that has a graph.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, ``"cann"`` or ``"cann:N"``; by default CUDA or CANN where its
            provider is installed, else the CPU.

    Raises:
        UsageError: no such device.
        BackendError: ONNX Runtime is not installed, has no such provider, or cannot load the graph.
        OutOfMemoryError: the device has too little memory.
        BundleError: the graph or its weights are broken.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise BackendError("onnxruntime is not installed", "pip install onnxruntime (or onnxruntime-gpu)") from None
    there = [kind for kind, (provider, _) in PROVIDERS.items() if provider in ort.get_available_providers()]
    place = _parse_device(device or (there[0] if there else "cpu"))
    if place.kind not in ("cpu", *there):
        package = {"cuda": "onnxruntime-gpu", "cann": "onnxruntime-cann"}[place.kind]
        hint = f"pip install {package}, or use --device cpu"
        raise BackendError(f"this onnxruntime has no {place.kind.upper()} provider", hint)
    return OnnxRuntimeEngine(bundle, component, place)


def _parse_device(device: str) -> Place:
    if match := re.fullmatch(r"(cpu|cuda|cann)(?::(\d{1,4}))?", device):
        return Place(match[1], int(match[2] or 0) if match[1] != "cpu" else 0)
    raise UsageError(f"ONNX Runtime has no device {device!r}", "choose cpu, cuda, cuda:N, cann or cann:N")


def _graphs(component: Component, place: Place, quantized: str) -> list[str]:
    """The graphs to try in turn.

    The CPU has no bfloat16 kernels: there a graph that computes in float32 runs, on the same weights; the one for CPUs
    if they add integers exactly. A GPU runs the bundle's own, and the one in float32 where it lacks kernels for that.
    """
    own = next(iter(component.graphs.values()))
    in_float32 = component.graphs.get("float32", own)
    if place.kind != "cpu":
        return list(dict.fromkeys((own, in_float32)))
    if quantized.startswith("int8") and not adds_integers_exactly():
        return [in_float32]
    return [component.graphs.get(CPU_GRAPH, in_float32)]


def _folds(component: Component, graph: str, quantized: str) -> bool:
    """Whether ONNX Runtime may compute beforehand what does not depend on the inputs.

    That would make a float32 copy of every weight, turned over, while the files stay mapped. It is worth it for small
    networks, for convolutions above all, and for graphs that dequantize 8-bit weights, which is slow in every step.
    """
    is_old = quantized not in ("", "int4-weights") and graph != component.graphs.get(CPU_GRAPH)
    return is_old or 4 * component.parameters <= FOLDED


def _largest_in_4_bits(bundle: Bundle, component: str) -> int:
    """Bytes of the largest weight in 4 bits, which are made unsigned beforehand; no weights of large networks else."""
    return max((info.nbytes for info in bundle.tensors(component).values() if info.dtype == "uint8"), default=0)


class OnnxRuntimeEngine(BaseEngine):
    """One session. Use :func:`open_engine`."""

    backend = "onnxruntime"

    def __init__(self, bundle: Bundle, component: str, place: Place) -> None:
        entry = bundle.component(component)
        if not entry.graphs:
            raise BackendError(f"{component} is a table of tensors and has no graph to run")
        super().__init__(component, entry, place.device)
        self._place = place
        quantized = bundle.manifest.quantized
        graphs = _graphs(entry, place, quantized)
        folds = place.kind != "cpu" or _folds(entry, graphs[0], quantized)
        most = None if folds else 0 if bundle.in_place else _largest_in_4_bits(bundle, component)
        self._session = _open_session(bundle, graphs, place, quantized, most)
        # The graph's own: one that computes in float32 also takes and gives float32 where the manifest has bfloat16.
        self._types = element_types(self._session.get_inputs())
        self._bound = None if place.kind == "cpu" else BoundSession(self._session, place, self.outputs)

    def _upload(self, name: str, array: NDArray[Any], dtype: str) -> Any:
        if dtype in ("float32", "bfloat16") and name in self._types:
            dtype = BY_ONNX[self._types[name]].name
        try:
            return upload(array, dtype, self._place)
        except Exception as error:
            raise explain(error, f"ONNX Runtime cannot take the inputs of {self.name}") from None

    def _run(self, feeds: Feeds, keep: Collection[str], sizes: Mapping[str, int]) -> dict[str, Any]:
        try:
            found = self._bound.run(feeds, keep, sizes) if self._bound else self._run_on_host(feeds)
            return {
                name: self._kept(name, value.shape(), value) if name in keep else download(value)
                for name, value in found.items()
            }
        except Exception as error:
            raise explain(error, f"ONNX Runtime failed in {self.name}") from None

    def _run_on_host(self, feeds: Feeds) -> dict[str, Any]:
        """Run it on arrays where they lie; every output gets memory of its own."""
        values = {
            name: on_host(feed, self._types[name])
            if isinstance(feed, np.ndarray)
            else converted(feed.value, self._types[name], self._place)
            for name, feed in feeds.items()
        }
        names = list(self.outputs)
        return dict(zip(names, self._session.run_with_ort_values(names, values), strict=True))

    def _download(self, handle: Handle) -> NDArray[Any]:
        try:
            return download(handle.value)
        except Exception as error:
            raise explain(error, f"ONNX Runtime cannot give back what {self.name} has on {self.device}") from None

    def _close(self) -> None:
        self._session = self._bound = None


def _open_session(bundle: Bundle, graphs: list[str], place: Place, quantized: str, folded: int | None) -> Any:
    """Load the first graph that the device has all kernels for.

    Args:
        bundle: an open bundle.
        graphs: files of it.
        place: the device.
        quantized: the precision of what is quantized, or nothing.
        folded: bytes of the largest result that is computed beforehand, of what does not depend on the inputs; None
            for any.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # What fails is raised; its log would be a second message.
    # Its plan of a first run nearly doubles the memory of a second one.
    options.enable_mem_pattern = False
    # Threads wait for work by spinning, and those of one engine would take the cores of the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    exact = {} if adds_integers_exactly() else EXACT
    for key, value in (SESSION.get(quantized, {}) | exact).items():
        options.add_session_config_entry(key, value)
    disabled = [FUSIONS] * (quantized == "fp8") + [FOLDING] * (folded == 0)
    if folded:
        options.add_session_config_entry(FOLDED_AT_MOST, str(folded))
    if bundle.in_place:
        options.add_session_config_entry("session.disable_prepacking", "1")
    providers: list[Any] = ["CPUExecutionProvider"]
    if place.kind != "cpu":
        if place.kind == "cuda":
            _load_cuda(ort)
        # Weights in memory of their own: they stay, and would leave holes in what is shared between runs.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        provider, of_provider = PROVIDERS[place.kind]
        providers.insert(0, (provider, {"device_id": str(place.number), **of_provider}))
    for graph in graphs:
        source = given(bundle, graph, options)
        try:
            session = ort.InferenceSession(
                source, options, providers=providers, enable_fallback=0, disabled_optimizers=disabled
            )
            break
        except Exception as error:
            if graph == graphs[-1] or not any(sign in str(error).lower() for sign in NO_KERNEL):
                raise explain(error, f"ONNX Runtime cannot load {bundle.file(graph)}") from None
    if place.kind == "cuda" and CUDA not in session.get_providers():
        raise _no_cuda("its provider does not load")
    if place.kind == "cann" and CANN not in session.get_providers():
        hint = "install CANN and source its set_env.sh, or use --device cpu"
        raise BackendError("ONNX Runtime could not start CANN (its provider does not load)", hint)
    _give_back_freed()
    return session


def _give_back_freed() -> None:
    """Give memory that was freed back to the system, which glibc keeps otherwise; elsewhere nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _load_cuda(ort: ModuleType) -> None:
    """Load the CUDA provider before any graph: ONNX Runtime would go on without it, and log the reason at most.

    Raises:
        BackendError: a library it needs is missing.
    """
    # CUDA and cuDNN where pip put them, which no search path names. What is not there may be elsewhere.
    with contextlib.redirect_stdout(io.StringIO()):
        getattr(ort, "preload_dlls", lambda directory: None)(directory="")
    folder = Path(str(ort.__file__)).parent / "capi"
    for name in ("libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"):
        if (folder / name).exists():
            try:
                ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise _no_cuda(" ".join(str(error).split())) from None


def _no_cuda(reason: str) -> BackendError:
    hint = "pip install 'onnxruntime-gpu[cuda,cudnn]' and a recent NVIDIA driver, or use --device cpu"
    return BackendError(f"ONNX Runtime could not start CUDA ({reason})", hint)
