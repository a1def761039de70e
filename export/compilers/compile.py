"""Compile the components of a bundle for the device at hand, and register the engines in its manifest."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from platformdirs import user_cache_path

from zimgkit.engines.bundle import Bundle, CompiledEngine, Component, FileRecord, Range, sha256, write_manifest
from zimgkit.engines.bundle.locks import only_writer_of
from zimgkit.engines.errors import OutputError, UsageError
from zimgkit.engines.tensorrt import api as tensorrt_api
from zimgkit.engines.tensorrt import cuda
from zimgkit.export.compilers.cards import check_compiles, check_multiplies
from zimgkit.export.compilers.shape_profiles import RECOMMENDED, ServedShapes, shape_profiles
from zimgkit.export.compilers.tensorrt.compiler import DEFAULT_OPTIONS, CompiledPlan, CompilerOptions, compile_plan
from zimgkit.export.compilers.tensorrt.graph import read_graph
from zimgkit.runtime.progress import Report, silent

FOLDER = "engines"
STREAMED_FROM = 4 << 30
"""Bytes of weights from which a component's plan can stream them, so that one plan serves cards of every size."""
RESULT_FIELDS = {"file": "", "memory_bytes": 0, "attention": (0, 0), "products": (0, 0)}
"""The fields of an engine's entry that only its compilation tells, with their defaults."""


@dataclass(frozen=True)
class Target:
    """The compiler that makes engines, and the device they are for."""

    compiler: str
    version: str
    device: str
    """The architecture, such as ``"sm90"``, or ``"any"``."""
    device_name: str = ""

    @property
    def folder(self) -> str:
        """The folder of its engines, relative to the bundle's."""
        return f"{FOLDER}/{self.compiler}-{self.version}-{self.device}"


@dataclass(frozen=True)
class CompiledComponent:
    """One component, compiled now or found up to date."""

    engine: CompiledEngine
    is_new: bool
    """False where the bundle had an engine that was up to date."""
    plan: CompiledPlan | None = None
    """What TensorRT reported, where it has just compiled."""


def find_target() -> Target:
    """Find the installed TensorRT and the GPU it compiles for.

    TensorRT times kernels on the GPU that will run the engine. TensorRT for RTX needs no GPU, and compiles for all GPUs
    that it supports.

    Raises:
        BackendError: no TensorRT is installed, or it needs a GPU and there is none.
    """
    module = tensorrt_api.load()
    name, version = tensorrt_api.name(module), tensorrt_api.version(module)
    if name == "tensorrt_rtx":
        return Target(name, version, "any")
    device = cuda.open_device()
    return Target(name, version, device.architecture, device.name)


def check_ready(backend: str) -> None:
    """Check that a backend's engines can be compiled on this machine.

    Raises:
        BackendError: what is missing.
    """
    if backend == "tensorrt-rtx":
        from zimgkit.engines.onnxruntime import tensorrt_rtx

        tensorrt_rtx.open_device()
    else:
        find_target()


def compile_bundle(
    path: Path,
    *,
    backend: str = "tensorrt",
    shapes: ServedShapes = RECOMMENDED,
    components: Sequence[str] = (),
    options: CompilerOptions = DEFAULT_OPTIONS,
    weight_streaming_budget: int | None = None,
    force: bool = False,
    report: Report = silent,
) -> list[CompiledComponent]:
    """Compile a bundle's components, and register each engine in the manifest as soon as it is compiled.

    An engine that the bundle has already, compiled from the same graph and weights for the same device and shapes, is
    not compiled again. Engines for other devices stay in the bundle.

    Args:
        path: the bundle's folder.
        backend: ``"tensorrt"``, or ``"tensorrt-rtx"``, ONNX Runtime's plugin, which has none of the options.
        shapes: the picture sizes, prompt lengths and batch sizes to serve.
        components: which ones; when empty all that have a graph, but for the pieces of a denoiser.
        options: of the compiler. The timing cache is that of this compiler and GPU unless the options name another.
        weight_streaming_budget: how many bytes of weights stay on the device at the most, while the rest is streamed to
            it in each run; None keeps as many as fit when a plan is loaded, of components that are large.
        force: compile engines that are up to date as well.
        report: called with (stage, done, total).

    Raises:
        UsageError: a size, a token count or a component is not one of this bundle.
        BackendError: TensorRT is missing or refuses a graph, or there is no GPU where it needs one.
        OutputError: the disk is full, or another process writes the bundle.
    """
    path = path.expanduser().absolute()
    # Opened under the lock: an engine that another process has just registered is then not removed as unlisted.
    with only_writer_of(path):
        bundle = Bundle.open(path)
        bundle.check_changeable()
        check_compiles(bundle.manifest.quantized)
        profiles = shape_profiles(bundle.manifest, shapes)
        if unknown := [name for name in components if name not in profiles]:
            raise UsageError(f"the bundle has no graph called {unknown[0]!r}", f"it has {', '.join(profiles)}")
        # Few need the pieces of a denoiser, which have its size.
        components = components or [name for name in profiles if not bundle.manifest.is_piece(name)]
        if weight_streaming_budget is not None and weight_streaming_budget < 0:
            raise UsageError(f"the weight streaming budget is {weight_streaming_budget}", "give 0 bytes or more")
        if backend == "tensorrt-rtx":
            if options != DEFAULT_OPTIONS or weight_streaming_budget is not None:
                raise UsageError("the tensorrt-rtx backend has no options", "leave them out, or use --backend tensorrt")
            return _compile_contexts(bundle, components, profiles, force=force, report=report)
        target = find_target()
        if quantization := bundle.manifest.quantization:
            check_multiplies(quantization.precision, target.device, target.device_name)
        if options.timing_cache is None and target.compiler == "tensorrt":
            # TensorRT for RTX would compile for the one GPU that was measured.
            options = replace(options, timing_cache=timing_cache(target))
        _remove_unlisted_files(path)
        return [
            _compile(
                Bundle.open(path, verify=False),
                CompiledEngine(
                    component=name,
                    file=f"{target.folder}/{name}-{secrets.token_hex(4)}.plan",
                    backend="tensorrt",
                    compiler=target.compiler,
                    version=target.version,
                    device=target.device,
                    source=bundle.source_hash(name),
                    profiles=profiles[name],
                    weight_streaming_budget=weight_streaming_budget,
                    streamable=_is_streamable(bundle.component(name), weight_streaming_budget),
                    refittable=options.refittable,
                    stripped=options.stripped,
                    plugins=options.plugins,
                ),
                replace(options, weight_streaming=_is_streamable(bundle.component(name), weight_streaming_budget)),
                force=force,
                report=report,
            )
            for name in components
        ]


def _compile_contexts(
    bundle: Bundle,
    components: Sequence[str],
    profiles: Mapping[str, tuple[dict[str, Range], ...]],
    *,
    force: bool,
    report: Report,
) -> list[CompiledComponent]:
    """As :func:`compile_bundle`, for ONNX Runtime's TensorRT for RTX plugin."""
    from zimgkit.engines.onnxruntime import tensorrt_rtx
    from zimgkit.export.compilers.tensorrt_rtx import compile_contexts

    device = tensorrt_rtx.open_device()
    _remove_unlisted_files(bundle.root)
    done = []
    for name in components:
        current = (device.version, device.architecture, bundle.source_hash(name), profiles[name])
        found = [
            engine
            for engine in bundle.engines(name, tensorrt_rtx.BACKEND)
            if (engine.version, engine.device, engine.serves, engine.profiles) == current and not force
        ]
        is_new = not found
        if is_new:
            found = compile_contexts(bundle, [name], profiles, bundle.root, report)
            register_engines(Bundle.open(bundle.root, verify=False), found)
        done.append(CompiledComponent(found[0], is_new))
    return done


def timing_cache(target: Target) -> Path:
    """The file of kernel timings in the user's cache: one per compiler, version and GPU."""
    gpu = re.sub(r"[^a-z0-9]+", "-", target.device_name.lower()).strip("-")
    return user_cache_path("zimgkit") / "timing" / f"{target.compiler}-{target.version}-{target.device}-{gpu}.cache"


def _compile(
    bundle: Bundle, wanted: CompiledEngine, options: CompilerOptions, *, force: bool, report: Report
) -> CompiledComponent:
    """Compile one component, unless the bundle has an engine of it that is up to date."""
    for engine in bundle.engines(wanted.component, wanted.backend):
        if not force and _compiled_for(engine) == _compiled_for(wanted):
            return CompiledComponent(engine, is_new=False)
    graph = read_graph(bundle, wanted.component, wanted.profiles, plugins=options.plugins)
    final = bundle.root / wanted.file
    part = final.with_suffix(".part")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        plan = compile_plan(graph, bundle.component(wanted.component), wanted.profiles, part, options, report)
        part.rename(final)
        fused = len(graph.attentions) - len(plan.unfused)
        in_8_bits = len(graph.products) - len(plan.not_in_8_bits)
        engine = msgspec.structs.replace(
            wanted,
            attention=(fused, len(plan.unfused)),
            products=(in_8_bits, len(plan.not_in_8_bits)),
            memory_bytes=plan.memory_bytes,
        )
        register_engines(bundle, [engine])
    except OSError as error:
        raise OutputError(f"{final} cannot be written ({error.strerror or error})", "free some space") from None
    finally:
        _remove_unlisted_files(bundle.root)
    return CompiledComponent(engine, is_new=True, plan=plan)


def _is_streamable(component: Component, budget: int | None) -> bool:
    """Whether a plan is compiled so that its weights can be streamed."""
    return budget is not None or component.weight_bytes >= STREAMED_FROM


def register_engines(bundle: Bundle, engines: Sequence[CompiledEngine]) -> None:
    """Write engines whose files are in place into the manifest, and delete those they replace.

    An engine replaces another one of the same component, backend, compiler and device. The manifest is replaced in one
    step: a crash leaves the old one, and at worst a file that it does not list.
    """
    manifest = bundle.manifest
    replaced = [old for old in manifest.engines if any(_slot(old) == _slot(engine) for engine in engines)]
    others = tuple(old for old in manifest.engines if old not in replaced)
    removed = {name for old in replaced for name in old.files}
    files = {name: record for name, record in manifest.files.items() if name not in removed}
    for engine in engines:
        for name in engine.files:
            path = bundle.root / name
            files[name] = FileRecord(path.stat().st_size, sha256(path))
    write_manifest(bundle.root, msgspec.structs.replace(manifest, engines=(*others, *engines), files=files))
    for name in removed:
        (bundle.root / name).unlink(missing_ok=True)
    Bundle.open(bundle.root, verify=False).trust()


def _compiled_for(engine: CompiledEngine) -> CompiledEngine:
    """The entry without its results: equal for engines that were compiled from and for the same."""
    return msgspec.structs.replace(engine, source=engine.serves, refit=None, **RESULT_FIELDS)


def _slot(engine: CompiledEngine) -> tuple[str, ...]:
    """What a bundle has at most one engine for."""
    return engine.component, engine.backend, engine.compiler, engine.version, engine.device


def _remove_unlisted_files(root: Path) -> None:
    """Delete engine files that the manifest does not list: a compilation that fails or is killed leaves them."""
    bundle = Bundle.open(root, verify=False)
    for path in (bundle.root / FOLDER).rglob("*"):
        if path.is_file() and path.relative_to(bundle.root).as_posix() not in bundle.manifest.files:
            path.unlink()
