"""Engines for a bundle: each component compiled for the device at hand, and entered into the manifest."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from platformdirs import user_cache_path

from zimgkit.engines.bundle import Bundle, CompiledEngine, FileRecord, Range, sha256, write_manifest
from zimgkit.engines.bundle.locks import only_writer_of
from zimgkit.engines.errors import OutputError, UsageError
from zimgkit.engines.tensorrt import api as tensorrt_api
from zimgkit.engines.tensorrt import cuda
from zimgkit.export.compilers.cards import check_multiplies
from zimgkit.export.compilers.shape_profiles import RECOMMENDED, Served, profiles
from zimgkit.export.compilers.tensorrt.compiler import PLAIN, Options, Plan, compile_plan
from zimgkit.export.compilers.tensorrt.graph import read_graph
from zimgkit.runtime.progress import Report, silent

FOLDER = "engines"
DECIDED_AFTERWARDS = {"file": "", "memory_bytes": 0, "attention": (0, 0), "products": (0, 0)}
"""Fields of an engine's entry that do not say what it was compiled for."""


@dataclass(frozen=True)
class Target:
    """What engines are compiled with, and for."""

    compiler: str
    version: str
    device: str
    """The architecture, such as ``"sm90"``, or ``"any"``."""
    device_name: str = ""

    @property
    def folder(self) -> str:
        """Where its engines lie in a bundle."""
        return f"{FOLDER}/{self.compiler}-{self.version}-{self.device}"


@dataclass(frozen=True)
class Compiled:
    """One component, compiled now or found up to date."""

    engine: CompiledEngine
    is_new: bool
    """False where it was up to date."""
    plan: Plan | None = None
    """What TensorRT said of it, where it compiled."""


def find_target() -> Target:
    """The installed TensorRT, and the GPU it compiles for.

    TensorRT measures on the GPU that will run the engine. TensorRT for RTX compiles ahead, for all GPUs it serves.

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
    """Check that a backend's engines can be compiled here.

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
    served: Served = RECOMMENDED,
    components: Sequence[str] = (),
    options: Options = PLAIN,
    weight_streaming_budget: int | None = None,
    force: bool = False,
    report: Report = silent,
) -> list[Compiled]:
    """Compile a bundle's components; each is entered into the manifest as soon as it is done.

    What is there already, compiled from the same graph and weights for the same device and shapes, stays as it is.
    Engines for other devices stay as well.

    Args:
        path: the bundle's folder.
        backend: ``"tensorrt"``, or ``"tensorrt-rtx"``, ONNX Runtime's plugin, which has none of the options.
        served: sizes, prompt lengths and batches to serve.
        components: which ones; all that have a graph when empty.
        options: of the compiler. Its timing cache is the one of this compiler and GPU unless it names another.
        weight_streaming_budget: bytes of weights to keep on the device, the rest being streamed to it; None keeps all.
        force: compile what is up to date as well.
        report: called with (stage, done, total).

    Raises:
        UsageError: a size, a token count or a component that cannot be.
        BackendError: TensorRT is missing or refuses a graph, or there is no GPU where it needs one.
        OutputError: the disk is full, or another process writes the bundle.
    """
    path = path.expanduser().absolute()
    # Opened under the lock: what another process has just finished is then known, and not taken for a stray.
    with only_writer_of(path):
        bundle = Bundle.open(path)
        ranges = profiles(bundle.manifest, served)
        if unknown := [name for name in components if name not in ranges]:
            raise UsageError(f"the bundle has no graph called {unknown[0]!r}", f"it has {', '.join(ranges)}")
        if weight_streaming_budget is not None and weight_streaming_budget < 0:
            raise UsageError(f"the weight streaming budget is {weight_streaming_budget}", "give 0 bytes or more")
        if backend == "tensorrt-rtx":
            if options != PLAIN or weight_streaming_budget is not None:
                raise UsageError("the tensorrt-rtx backend has no options", "leave them out, or use --backend tensorrt")
            return _compile_contexts(bundle, components or tuple(ranges), ranges, force=force, report=report)
        target = find_target()
        if quantization := bundle.manifest.quantization:
            check_multiplies(quantization.precision, target.device, target.device_name)
        if options.timing_cache is None and target.compiler == "tensorrt":
            # TensorRT for RTX would compile for the one GPU that was measured.
            options = replace(options, timing_cache=timing_cache(target))
        options = replace(options, weight_streaming=weight_streaming_budget is not None)
        _clear_strays(path)
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
                    profiles=ranges[name],
                    weight_streaming_budget=weight_streaming_budget,
                    refittable=options.refittable,
                    stripped=options.stripped,
                ),
                options,
                force=force,
                report=report,
            )
            for name in components or ranges
        ]


def _compile_contexts(
    bundle: Bundle,
    components: Sequence[str],
    ranges: Mapping[str, tuple[dict[str, Range], ...]],
    *,
    force: bool,
    report: Report,
) -> list[Compiled]:
    """The same for ONNX Runtime's plugin."""
    from zimgkit.engines.onnxruntime import tensorrt_rtx
    from zimgkit.export.compilers.tensorrt_rtx import compile_contexts

    device = tensorrt_rtx.open_device()
    _clear_strays(bundle.root)
    done = []
    for name in components:
        current = (device.version, device.architecture, bundle.source_hash(name), ranges[name])
        found = [
            engine
            for engine in bundle.engines(name, tensorrt_rtx.BACKEND)
            if (engine.version, engine.device, engine.serves, engine.profiles) == current and not force
        ]
        is_new = not found
        if is_new:
            found = compile_contexts(bundle, [name], ranges, bundle.root, report)
            enter(Bundle.open(bundle.root, verify=False), found)
        done.append(Compiled(found[0], is_new))
    return done


def timing_cache(target: Target) -> Path:
    """Where what was measured is kept: one file per compiler, version and GPU."""
    gpu = re.sub(r"[^a-z0-9]+", "-", target.device_name.lower()).strip("-")
    return user_cache_path("zimgkit") / "timing" / f"{target.compiler}-{target.version}-{target.device}-{gpu}.cache"


def _compile(bundle: Bundle, wanted: CompiledEngine, options: Options, *, force: bool, report: Report) -> Compiled:
    """Compile one component, unless the bundle has just what is wanted."""
    for engine in bundle.engines(wanted.component, wanted.backend):
        if not force and _purpose(engine) == _purpose(wanted):
            return Compiled(engine, is_new=False)
    graph = read_graph(bundle, wanted.component, wanted.profiles)
    final = bundle.root / wanted.file
    part = final.with_suffix(".part")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        plan = compile_plan(graph, bundle.component(wanted.component), wanted.profiles, part, options, report)
        part.rename(final)
        fused = len(graph.attentions) - len(plan.unfused)
        narrow = len(graph.products) - len(plan.widened)
        engine = msgspec.structs.replace(
            wanted,
            attention=(fused, len(plan.unfused)),
            products=(narrow, len(plan.widened)),
            memory_bytes=plan.memory_bytes,
        )
        enter(bundle, [engine])
    except OSError as error:
        raise OutputError(f"{final} cannot be written ({error.strerror or error})", "free some space") from None
    finally:
        _clear_strays(bundle.root)
    return Compiled(engine, is_new=True, plan=plan)


def enter(bundle: Bundle, engines: Sequence[CompiledEngine]) -> None:
    """Enter engines whose files are there into the manifest, and remove those they replace.

    An engine replaces another one of the same component, backend, compiler and device. The manifest is replaced in one
    step: a crash leaves the old one, and at worst a file that nothing names.
    """
    manifest = bundle.manifest
    replaced = [old for old in manifest.engines if any(_place(old) == _place(engine) for engine in engines)]
    kept = tuple(old for old in manifest.engines if old not in replaced)
    gone = {name for old in replaced for name in old.files}
    files = {name: record for name, record in manifest.files.items() if name not in gone}
    for engine in engines:
        for name in engine.files:
            path = bundle.root / name
            files[name] = FileRecord(path.stat().st_size, sha256(path))
    write_manifest(bundle.root, msgspec.structs.replace(manifest, engines=(*kept, *engines), files=files))
    for name in gone:
        (bundle.root / name).unlink(missing_ok=True)
    Bundle.open(bundle.root, verify=False).trust()


def _purpose(engine: CompiledEngine) -> CompiledEngine:
    return msgspec.structs.replace(engine, source=engine.serves, refit=None, **DECIDED_AFTERWARDS)


def _place(engine: CompiledEngine) -> tuple[str, ...]:
    return engine.component, engine.backend, engine.compiler, engine.version, engine.device


def _clear_strays(root: Path) -> None:
    """Remove engines that the manifest does not name: a compilation that fails or is killed leaves them."""
    bundle = Bundle.open(root, verify=False)
    for path in (bundle.root / FOLDER).rglob("*"):
        if path.is_file() and path.relative_to(bundle.root).as_posix() not in bundle.manifest.files:
            path.unlink()
