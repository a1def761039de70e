"""Compile one graph into one TensorRT plan."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from zimgkit.engines.bundle import Component, Range
from zimgkit.engines.errors import BackendError
from zimgkit.engines.files import replacing
from zimgkit.engines.tensorrt import api as tensorrt_api
from zimgkit.engines.tensorrt import cuda
from zimgkit.export.compilers.tensorrt import layers
from zimgkit.export.compilers.tensorrt.graph import Graph
from zimgkit.export.compilers.tensorrt.plugins import register
from zimgkit.runtime.progress import Report, silent

THOUSANDTHS = 1000
"""The progress of a compilation is reported in steps of a thousandth."""


@dataclass(frozen=True)
class CompilerOptions:
    """Options of the compiler."""

    workspace_bytes: int | None = None
    """The most scratch memory in bytes that a layer may take; all of the device's where None."""
    weight_streaming: bool = False
    """Let the plan stream weights to the device, within a budget that is set when it is loaded."""
    refittable: bool = False
    """Let the plan take other weights when it is loaded."""
    stripped: bool = False
    """Leave the weights out of the plan; it takes them when it is loaded."""
    plugins: bool = False
    """Let operators of ours have their own kernels, which lie in the plan; untested."""
    optimization_level: int | None = None
    """0 compiles fastest, 5 searches longest; the compiler's own choice where None."""
    timing_cache: Path | None = None
    """A file of kernel timings: read if it exists, and written back with those that were measured."""


DEFAULT_OPTIONS = CompilerOptions()


@dataclass(frozen=True)
class CompiledPlan:
    """A plan file and what the compiler reported of it."""

    file: Path
    layers: list[layers.Layer]
    unfused: tuple[str, ...]
    """The calls whose attention is not one fused kernel."""
    not_in_8_bits: tuple[str, ...]
    """Matrix products of quantized inputs that are not computed in 8 bits, each as ``node | call``."""
    memory_bytes: int
    """Device memory in bytes that the plan needs beside its weights; 0 where there is no GPU to ask."""
    warnings: tuple[str, ...]
    """The compiler's warnings, each once."""


def compile_plan(
    graph: Graph,
    component: Component,
    profiles: Sequence[dict[str, Range]],
    file: Path,
    options: CompilerOptions = DEFAULT_OPTIONS,
    report: Report = silent,
) -> CompiledPlan:
    """Compile a graph into a plan file.

    Args:
        graph: what to compile.
        component: its entry in the manifest, for its inputs.
        profiles: the shape profiles: dynamic dimension -> (min, opt, max) length.
        file: where the plan is written.
        options: of the compiler.
        report: called with (stage, done, total).

    Raises:
        BackendError: TensorRT is missing or refuses the graph; the message is the compiler's own.
        KeyboardInterrupt: the user stopped it.
    """
    module = tensorrt_api.load()
    if options.plugins:
        register(module)
    log = tensorrt_api.make_logger(module)
    builder = _builder(module, log)
    # Every tensor is computed in the type that the graph gives it; TensorRT 11 has no other kind of network.
    kinds = module.NetworkDefinitionCreationFlag
    flags = [kinds.STRONGLY_TYPED, *([kinds.PREFER_AOT_PYTHON_PLUGINS] if options.plugins else [])]
    network = builder.create_network(sum(1 << int(flag) for flag in flags))
    if network is None:
        raise _refusal(graph, log, "compile", _advice(options))
    parser = module.OnnxParser(network, log)
    _parse(parser, graph, log, options)
    config = _config(module, log, builder, network, component, profiles, options)
    progress = _progress(module, f"compile {graph.component}", report)
    config.progress_monitor = progress
    plan = builder.build_serialized_network(network, config)
    if progress.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise _refusal(graph, log, "compile", _advice(options))
    file.write_bytes(memoryview(plan))
    report(f"compile {graph.component}", THOUSANDTHS, THOUSANDTHS)
    if options.timing_cache:
        try:
            _save_timings(config, options.timing_cache)
        except OSError as error:
            log.warnings.append(f"the timing cache {options.timing_cache} cannot be written ({error.strerror})")
    found, memory = _inspect(module, log, plan) or (layers.from_log(log.layers), 0)
    times = 1 if memory else len(profiles)
    unfused = layers.unfused(found, graph.attentions, times)
    not_in_8_bits = layers.not_in_8_bits(found, graph.products, times)
    return CompiledPlan(file, found, unfused, not_in_8_bits, memory, tuple(dict.fromkeys(log.warnings)))


def _inspect(module: ModuleType, log: Any, plan: Any) -> tuple[list[layers.Layer], int] | None:
    """The layers of a plan and its device memory in bytes, which the runtime tells; None without a GPU."""
    try:
        cuda.open_device()
    except BackendError:
        return None
    runtime = module.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    text = engine.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON)
    return layers.from_inspector(text), int(engine.device_memory_size_v2)


def _builder(module: ModuleType, log: Any) -> Any:
    try:
        return module.Builder(log)
    except Exception:
        reason = log.errors[-1] if log.errors else "it gives no reason"
        raise BackendError(
            f"TensorRT does not start: {reason}", "check the GPU and its driver with nvidia-smi"
        ) from None


def _parse(parser: Any, graph: Graph, log: Any, options: CompilerOptions) -> None:
    """Parse a graph; its weights go to the parser by address, from the mapped files: no protobuf holds them."""
    ok = parser.load_model_proto(graph.model)
    for name, data in graph.weights.items():
        ok = ok and parser.load_initializer(name, data.ctypes.data, data.nbytes)
    if ok and parser.parse_model_proto():
        return
    said = [parser.get_error(index) for index in range(parser.num_errors)]
    log.errors[:0] = [
        f"{error.desc()} (node {error.node_name() or '?'}, {error.node_operator() or '?'})" for error in said
    ]
    hint = _advice(options) if options.plugins else "report this, with the bundle's inspect output"
    raise _refusal(graph, log, "read", hint)


def _refusal(graph: Graph, log: Any, what: str, hint: str) -> BackendError:
    # The first error is the cause; the driver's absence is none where the compiler needs no GPU.
    causes = [line for line in log.errors if "cudaError 35" not in line]
    reason = causes[0] if causes else "it gives no reason"
    return BackendError(f"TensorRT cannot {what} {graph.component}: {reason[:600]}", hint)


def _advice(options: CompilerOptions) -> str:
    if options.plugins:
        return "try it without --plugins, which is untested"
    if options.refittable or options.stripped:
        return "try it without --refittable and --stripped, which not every TensorRT supports"
    return "try another --workspace or a smaller --max-size, and report this if it stays"


def _config(
    module: ModuleType,
    log: Any,
    builder: Any,
    network: Any,
    component: Component,
    profiles: Sequence[dict[str, Range]],
    options: CompilerOptions,
) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    # Working memory then follows the shapes in use rather than the largest ones.
    config.set_preview_feature(module.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    if hasattr(module.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # TensorRT for RTX needs it for plans whose runs are recorded as CUDA graphs.
        config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)
    for flag, wanted in {
        "WEIGHT_STREAMING": options.weight_streaming,
        "REFIT": options.refittable,
        "STRIP_PLAN": options.stripped,
        # The weights that it was compiled from, and no others: what TensorRT made of their values stays.
        "REFIT_IDENTICAL": options.stripped and not options.refittable,
    }.items():
        if wanted:
            config.set_flag(getattr(module.BuilderFlag, flag))
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.timing_cache:
        stored = b""
        with contextlib.suppress(OSError):
            stored = options.timing_cache.read_bytes()
        # Of what is damaged, or of another GPU, it makes an empty one.
        config.set_timing_cache(config.create_timing_cache(stored), False)
        log.errors.clear()  # What it has against the timings is no reason for what fails later.
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            name = network.get_input(index).name
            shape = component.inputs[name].shape
            shapes = [[ranges[dim][bound] if isinstance(dim, str) else dim for dim in shape] for bound in range(3)]
            profile.set_shape(name, *shapes)  # Min, opt and max.
        config.add_optimization_profile(profile)
    return config


def _save_timings(config: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_bytes(memoryview(config.get_timing_cache().serialize()))


def _progress(module: ModuleType, stage: str, report: Report) -> Any:
    """Make a monitor that reports the compiler's nested phases as one fraction, and ends the build on Ctrl-C."""

    class Progress(module.IProgressMonitor):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.interrupted = False
            self.phases: dict[str, tuple[str | None, int, int]] = {}
            self.furthest = 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = (parent_phase, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                parent, _, steps = self.phases.get(phase_name, (None, 0, step + 1))
                self.phases[phase_name] = (parent, step + 1, steps)
                self.furthest = max(self.furthest, int(THOUSANDTHS * self._fraction()))
                report(stage, min(self.furthest, THOUSANDTHS - 1), THOUSANDTHS)
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def _fraction(self) -> float:
            """Of the outermost phase, with the phases within it as parts of its next step."""
            fraction = 0.0
            for _, done, steps in reversed(self.phases.values()):
                fraction = min(1.0, (done + fraction) / max(1, steps))
            return fraction

    return Progress()
