"""Compile engine contexts for ONNX Runtime's TensorRT for RTX plugin: a graph of one node, and the engine it runs.

On Linux the plugin compiles for a GPU of the machine only: the option to compile for another one (``nv_target_sm``)
is read on Windows alone.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from zimgkit.engines.bundle import Bundle, CompiledEngine, Range
from zimgkit.engines.errors import BackendError, OutputError, UsageError
from zimgkit.engines.onnxruntime import tensorrt_rtx
from zimgkit.engines.onnxruntime.bound import explain
from zimgkit.export.compilers.shape_profiles import dynamic_dimensions
from zimgkit.runtime.progress import Report, silent

NODE = "EPContext"
ENGINE = "ep_cache_context"
"""The attribute of that node which names the engine's file, in its own folder."""
Profiles = Sequence[dict[str, Range]]


def compile_contexts(
    bundle: Bundle, components: Sequence[str], profiles: Mapping[str, Profiles], folder: Path, report: Report = silent
) -> list[CompiledEngine]:
    """Compile components for the first GPU that the plugin accepts.

    Args:
        bundle: an open bundle.
        components: which ones.
        profiles: component -> its shape profiles, each of all its dynamic dimensions, as
            :func:`zimgkit.export.compilers.shape_profiles.shape_profiles` gives them.
        folder: the bundle's; files are written to its ``engines/tensorrt-rtx-<version>-<architecture>/``.
        report: called with (stage, done, total).

    Returns:
        One manifest entry per component, its ``file`` and ``data`` relative to ``folder``.

    Raises:
        BackendError: the plugin or a GPU for it is missing, or it refuses a graph. The first two before any work.
        OutOfMemoryError: the GPU has too little memory to compile.
        UsageError: a profile has no range for a dynamic dimension.
        OutputError: the folder cannot be written.
    """
    device = tensorrt_rtx.open_device()
    for component in components:
        tensorrt_rtx.check_component(bundle, component)
        _check_profiles(bundle, component, profiles[component])
    return [_compile(bundle, component, profiles[component], device, folder, report) for component in components]


def _check_profiles(bundle: Bundle, component: str, profiles: Profiles) -> None:
    dimensions = dynamic_dimensions(bundle.component(component))
    for profile in profiles:
        if missing := [dimension for dimension in dimensions if dimension not in profile]:
            raise UsageError(
                f"{component} has the dynamic dimension {missing[0]!r}, which has no range", "give its min, opt and max"
            )


def _compile(
    bundle: Bundle, component: str, profiles: Profiles, device: tensorrt_rtx.Device, folder: Path, report: Report
) -> CompiledEngine:
    report(f"compile {component}", 0, 1)
    place = Path("engines") / f"{tensorrt_rtx.BACKEND}-{device.version}-{device.architecture}"
    stem = f"{component}-{secrets.token_hex(4)}"
    part = folder / place / f".{stem}.part"
    try:
        part.mkdir(parents=True)
        context, engine = _compile_into(part, bundle, component, profiles, device)
        file, data = place / f"{stem}.onnx", place / f"{stem}.engine"
        engine.rename(folder / data)
        _point_to(context, data.name)
        context.rename(folder / file)
    except OSError as error:
        message = f"{folder / place} cannot be written ({error.strerror or error})"
        raise OutputError(message, "check the path and its rights, or free some space") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    report(f"compile {component}", 1, 1)
    return CompiledEngine(
        component=component,
        file=file.as_posix(),
        backend=tensorrt_rtx.BACKEND,
        compiler=tensorrt_rtx.PLUGIN,
        version=device.version,
        device=device.architecture,
        source=bundle.source_hash(component),
        profiles=tuple(profiles),
        data=data.as_posix(),
    )


def _compile_into(
    part: Path, bundle: Bundle, component: str, profiles: Profiles, device: tensorrt_rtx.Device
) -> tuple[Path, Path]:
    """Compile into an empty folder; returns the context's file and the engine's."""
    import onnxruntime as ort

    entry = bundle.component(component)
    graph, context = bundle.file(next(iter(entry.graphs.values()))), part / "context.onnx"

    def make(provider_options: dict[str, str]) -> None:
        for leftover in part.iterdir():
            leftover.unlink()
        options = tensorrt_rtx.session_options(ort, device, entry.inputs, profiles, provider_options)
        flags = ort.OrtCompileApiFlags.ERROR_IF_NO_NODES_COMPILED
        ort.ModelCompiler(options, str(graph), flags=flags).compile_to_file(str(context))

    try:
        tensorrt_rtx.build(make)
    except Exception as error:
        raise explain(error, f"TensorRT for RTX cannot compile {component}", tensorrt_rtx.OTHERS) from None
    nodes = onnx.load(context, load_external_data=False).graph.node
    engines = [path for path in part.iterdir() if path != context]
    if [node.op_type for node in nodes] != [NODE] or len(engines) != 1:
        message = f"TensorRT for RTX takes {component} in {max(len(nodes), len(engines))} parts, not as a whole"
        raise BackendError(message, tensorrt_rtx.OTHERS)
    return context, engines[0]


def _point_to(context: Path, engine: str) -> None:
    """Set the name of the engine's file in the context: the plugin chose another one."""
    model = onnx.load(context, load_external_data=False)
    for attribute in model.graph.node[0].attribute:
        if attribute.name == ENGINE:
            attribute.s = engine.encode()
    onnx.save(model, context)
