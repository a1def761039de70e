"""TensorRT for RTX through ONNX Runtime's plugin, which brings the compiler along: for GeForce and RTX cards.

What ``zimg-export compile --backend tensorrt-rtx`` put into the bundle is loaded. A component without such an engine is
compiled when it first runs, for the shapes it then meets, and again for more shapes when it meets others.

Never run on a GPU so far: of the real plugin it is known that it registers, and that it compiles every component of
a bfloat16 bundle as one engine. No CUDA graph is recorded, for the reasons given in ``engine.py``.
Documentation: https://nvidia.github.io/TensorRT-RTX-EP-ABI/
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from platformdirs import user_cache_path

from zimgkit.engines.base import BaseEngine, Feeds, Handle
from zimgkit.engines.errors import BackendError, OutOfMemoryError, UsageError, install
from zimgkit.engines.onnxruntime.bound import BoundSession, explain
from zimgkit.engines.onnxruntime.graph import given
from zimgkit.engines.onnxruntime.values import Place, download, upload
from zimgkit.engines.shapes import Profile, choose_profile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zimgkit.engines.bundle import Bundle, CompiledEngine, TensorSpec

BACKEND = "tensorrt-rtx"
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
NVIDIA = 0x10DE
"""The vendor's number on the PCI bus."""
CARDS = "it needs a GeForce or RTX card of compute capability 8.6, 8.9, or 12.0 and up"
OTHERS = "use --backend tensorrt, onnxruntime or torch"

Built = TypeVar("Built")


@dataclass(frozen=True)
class Device:
    """A GPU that the plugin accepts."""

    handle: Any
    """``onnxruntime.OrtEpDevice``."""
    index: int
    """CUDA's number of it."""
    architecture: str
    """Such as ``"sm89"``; ``"any"`` where the plugin does not say."""
    version: str
    """Of the plugin."""


def load() -> tuple[ModuleType, str, str]:
    """Import ONNX Runtime and register the plugin with it, once for the process.

    Returns:
        ONNX Runtime, the name of the plugin's provider, and the plugin's version.

    Raises:
        BackendError: one of them is not installed, or there is no NVIDIA driver.
    """
    try:
        ort, plugin = import_module("onnxruntime"), import_module(PLUGIN)
    except ImportError:
        raise BackendError("the TensorRT for RTX plugin of ONNX Runtime is not installed", install(BACKEND)) from None
    if not hasattr(ort, "register_execution_provider_library"):
        raise BackendError(f"onnxruntime {ort.__version__} takes no plugins", "pip install -U 'onnxruntime>=1.27'")
    name = plugin.get_ep_name()
    # The plugin brings a CUDA runtime, under a name that no search would find.
    for library in Path(plugin.__file__ or "").parent.glob("libcudart.so.*"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    try:
        ort.register_execution_provider_library(name, plugin.get_library_path())
    except Exception as error:
        text = " ".join(str(error).split())
        if "libcuda.so" in text or "libnvidia-ml.so" in text:
            raise BackendError("TensorRT for RTX needs an NVIDIA driver, and there is none", OTHERS) from None
        if "already registered" not in text:
            message = f"the TensorRT for RTX plugin does not load: {text[:300]}"
            raise BackendError(message, f"install it again: {install(BACKEND)}") from None
    return ort, name, str(plugin.__version__)


def open_device(index: int | None = None) -> Device:
    """A GPU that the plugin accepts.

    Args:
        index: CUDA's number of it; the first one when None.

    Raises:
        UsageError: the plugin accepts GPUs, but none of this number.
        BackendError: the plugin is not installed, or accepts none of this machine's GPUs.
    """
    ort, name, version = load()
    found = []
    for position, handle in enumerate(handle for handle in ort.get_ep_devices() if handle.ep_name == name):
        known = {**handle.ep_options, **handle.ep_metadata}
        number = int(known.get("device_id", position))
        found.append(Device(handle, number, known.get("target_architecture", "any"), version))
    if not found:
        reasons = "; ".join(dict.fromkeys(_refusals(name))) or "there is no NVIDIA GPU"
        raise BackendError(f"TensorRT for RTX accepts no GPU of this machine ({reasons})", f"{CARDS}; {OTHERS}")
    for device in found:
        if index in (None, device.index):
            return device
    accepted = ", ".join(f"cuda:{device.index}" for device in found)
    raise UsageError(f"TensorRT for RTX does not accept cuda:{index}", f"choose {accepted}; {CARDS}")


def _refusals(name: str) -> Iterable[str]:
    """What the plugin has against each NVIDIA GPU of this machine."""
    binding = import_module("onnxruntime.capi._pybind_state")
    for hardware in getattr(binding, "get_hardware_devices", list)():
        if hardware.vendor_id == NVIDIA:
            details = binding.get_hardware_device_ep_incompatibility_details(name, hardware)
            yield str(details.get("notes") or "it gives no reason").strip().rstrip(".")


def open_engine(bundle: Bundle, component: str, device: str | None = None) -> TensorRTRTXEngine:
    """Open a component with the plugin.

    Args:
        bundle: an open bundle.
        component: a component that has a graph.
        device: ``"cuda"`` or ``"cuda:N"``; the first GPU that the plugin accepts when not given.

    Raises:
        UsageError: no such device.
        BackendError: the plugin or a GPU for it is missing, the bundle computes in float32, or its engine does not fit.
        OutOfMemoryError: the GPU has too little memory.
        BundleError: no such component, or a file is missing.
    """
    index = _parse_device(device or "cuda")
    check_component(bundle, component)
    found = open_device(index)
    return TensorRTRTXEngine(bundle, component, found, choose_engine(bundle, component, found))


def _parse_device(device: str) -> int | None:
    if match := re.fullmatch(r"cuda(?::(\d{1,4}))?", device):
        return int(match[1]) if match[1] else None
    raise UsageError(f"TensorRT for RTX has no device {device!r}", "choose cuda or cuda:N")


def check_component(bundle: Bundle, component: str) -> None:
    """Refuse what the compiler cannot take.

    Raises:
        BackendError: the component has no graph, or only one that computes in float32.
        BundleError: there is no such component.
    """
    graphs = bundle.component(component).graphs
    if not graphs:
        raise BackendError(f"{component} is a table of tensors and has no graph to run")
    if next(iter(graphs)) == "float32":
        message = f"{bundle.root} computes in float32, in which TensorRT for RTX has no attention"
        raise BackendError(message, f"build the bundle with --precision bf16, or {OTHERS}")


def choose_engine(bundle: Bundle, component: str, device: Device) -> CompiledEngine | None:
    """What was compiled ahead for this GPU and version of the plugin; None where nothing was compiled ahead at all.

    Raises:
        BackendError: there are engines, but none for this machine, or it was compiled from something else.
    """
    engines = bundle.engines(component, BACKEND)
    if not engines:
        return None
    fitting = [e for e in engines if e.version == device.version and e.device in (device.architecture, "any")]
    if not fitting:
        made = ", ".join(dict.fromkeys(f"version {e.version} on {e.device}" for e in engines))
        here = f"this machine has version {device.version} on {device.architecture}"
        message = f"{bundle.root} has engines of {component} for TensorRT for RTX of {made}; {here}"
        raise BackendError(message, f"compile it here: {compile_command(bundle)}")
    fresh = [engine for engine in fitting if engine.serves == bundle.source_hash(component)]
    if not fresh:
        message = f"the engine of {component} was compiled from another graph or other weights than the bundle has now"
        raise BackendError(message, f"compile it again: {compile_command(bundle)}")
    return fresh[0]


def compile_command(bundle: Bundle) -> str:
    """What compiles a bundle for this backend."""
    return f"zimg-export compile {bundle.root} --backend {BACKEND}"


def session_options(
    ort: ModuleType,
    device: Device,
    inputs: Mapping[str, TensorSpec],
    profiles: Sequence[Profile],
    provider_options: Mapping[str, str],
) -> Any:
    """Options of a session that is on the plugin as a whole, or fails.

    Args:
        ort: ONNX Runtime.
        device: where it runs.
        inputs: of the graph.
        profiles: to compile for, each of all dynamic dimensions; none for a graph that is compiled already.
        provider_options: more of the plugin's options.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # What fails is raised. The compiler's log also has errors that it gets over.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    given = {
        # Weights are handed over one by one: a whole graph with them would pass protobuf's 2 GB.
        "nv_use_external_data_initializer": "1",
        "nv_multi_profile_enable": str(int(len(profiles) > 1)),
        **provider_options,
    }
    if len(profiles) == 1 and all(low == high for low, _, high in profiles[0].values()):
        # All dimensions or none: TensorRT refuses rotary tables of dynamic length for rows of a fixed one.
        for dimension, (size, _, _) in profiles[0].items():
            options.add_free_dimension_override_by_name(dimension, size)
    elif profiles:
        for position, end in enumerate(("min", "opt", "max")):
            given[f"nv_profile_{end}_shapes"] = ",".join(_shapes(inputs, profile, position) for profile in profiles)
    options.add_provider_for_devices([device.handle], given)
    return options


def _shapes(inputs: Mapping[str, TensorSpec], profile: Profile, position: int) -> str:
    """``name:1x256x64,…``: every input in its min, opt or max shape."""
    shapes = {
        name: [profile[d][position] if isinstance(d, str) else d for d in spec.shape] for name, spec in inputs.items()
    }
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def build(make: Callable[[dict[str, str]], Built]) -> Built:
    """Have something compiled.

    Where the compiler refuses the graph, it is given once more with attention taken apart: heads as wide as a VAE's
    have no fused kernel, and ONNX Runtime expands what the plugin leaves to it.

    Args:
        make: compiles, given options of the provider.
    """
    try:
        return make({})
    except Exception as error:
        if isinstance(explain(error, ""), OutOfMemoryError | UsageError):
            raise
        try:
            return make({"nv_op_types_to_exclude": "Attention"})
        except Exception:
            raise error from None


class TensorRTRTXEngine(BaseEngine):
    """One session of the plugin. Use :func:`open_engine`.

    What was not compiled ahead is compiled by the first run, and again for more shapes when it meets others.
    """

    backend = BACKEND

    def __init__(self, bundle: Bundle, component: str, device: Device, entry: CompiledEngine | None) -> None:
        self._place = Place("cuda", device.index)
        super().__init__(component, bundle.component(component), self._place.device)
        self._bundle, self._accepted, self._entry = bundle, device, entry
        self._profiles: tuple[Profile, ...] = entry.profiles if entry else ()
        self._bound: BoundSession | None = None
        if entry:
            if entry.data:
                bundle.file(entry.data)  # Which the plugin opens by itself.
            several = {"nv_multi_profile_enable": str(int(len(entry.profiles) > 1))}
            self._bound = self._load(entry.file, (), several)

    def _upload(self, name: str, array: NDArray[Any], dtype: str) -> Any:
        try:
            return upload(array, dtype, self._place)
        except Exception as error:
            raise explain(error, f"TensorRT for RTX cannot take the inputs of {self.name}", OTHERS) from None

    def _run(self, feeds: Feeds, keep: Collection[str], sizes: Mapping[str, int]) -> dict[str, Any]:
        try:
            bound = self._ready(sizes)
            found = bound.run(feeds, keep, sizes, self._run_options(sizes))
            return {
                name: self._kept(name, value.shape(), value) if name in keep else download(value)
                for name, value in found.items()
            }
        except Exception as error:
            raise explain(error, f"TensorRT for RTX failed in {self.name}", OTHERS) from None

    def _download(self, handle: Handle) -> NDArray[Any]:
        try:
            return download(handle.value)
        except Exception as error:
            what = f"TensorRT for RTX cannot give back what {self.name} has on {self.device}"
            raise explain(error, what, OTHERS) from None

    def _close(self) -> None:
        self._bound = None

    def _ready(self, sizes: Mapping[str, int]) -> BoundSession:
        """The session; what was not compiled ahead is compiled for these sizes and all that came before."""
        known = self._profiles[0] if self._profiles else {dimension: (n, n, n) for dimension, n in sizes.items()}
        served = self._entry or all(known[name][0] <= size <= known[name][2] for name, size in sizes.items())
        if self._bound is None or not served:
            self._bound = None  # The old one first: both at once may not fit.
            profile = {name: (min(known[name][0], n), n, max(known[name][2], n)) for name, n in sizes.items()}
            graph = next(iter(self._bundle.component(self.name).graphs.values()))
            self._bound = build(lambda options: self._load(graph, (profile,), options))
            self._profiles = (profile,)
        return self._bound

    def _load(self, file: str, profiles: Sequence[Profile], provider_options: Mapping[str, str]) -> BoundSession:
        import onnxruntime as ort

        path = self._bundle.file(file)
        cache = user_cache_path("zimgkit") / BACKEND
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            # What the driver's compiler makes of the engine for the very GPU.
            provider_options = {"nv_runtime_cache_path": str(cache), **provider_options}
        try:
            options = session_options(ort, self._accepted, self.inputs, profiles, provider_options)
            # What was compiled ahead finds its second file beside its path.
            source = str(path) if self._entry else given(self._bundle, file, options)
            session = ort.InferenceSession(source, options, enable_fallback=0)
        except Exception as error:
            hint = f"compile it again: {compile_command(self._bundle)}" if self._entry else OTHERS
            raise explain(error, f"TensorRT for RTX cannot load {path}", hint) from None
        return BoundSession(session, self._place, self.outputs)

    def _run_options(self, sizes: Mapping[str, int]) -> Any:
        """Which of the engine's profiles serves these sizes."""
        import onnxruntime as ort

        command = compile_command(self._bundle)
        hint = f"compile it for that too, with --size, --max-size or --max-prompt-tokens: {command}"
        profile = choose_profile(self.name, self.inputs, self._profiles, sizes, hint)
        options = ort.RunOptions()
        if len(self._profiles) > 1:
            options.add_run_config_entry("nv_profile_index", str(profile))
        return options
