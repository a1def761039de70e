"""Engines in a bundle: what is entered, what stays and what goes, whatever happens on the way."""

from __future__ import annotations

import errno
import multiprocessing
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest

import zimgkit.export.compilers.compile as compiling
from tests import fake_tensorrt
from zimgkit.engines.bundle import MANIFEST, Bundle, record_files, write_manifest
from zimgkit.engines.bundle.locks import only_writer_of
from zimgkit.engines.errors import BackendError, BundleError, OutputError, UsageError, install
from zimgkit.engines.tensorrt import api as tensorrt_api
from zimgkit.engines.tensorrt import cuda
from zimgkit.export.compilers.compile import Target, compile_bundle, find_target, register_engines, timing_cache
from zimgkit.export.compilers.shape_profiles import ServedShapes
from zimgkit.export.compilers.tensorrt.compiler import CompilerOptions
from zimgkit.runtime import Pipeline

SMALL, OTHER = ServedShapes(sizes=((64, 64),)), ServedShapes(sizes=((128, 64),), max_prompt_tokens=100)
COMPONENTS = ["text_encoder", "conditioner", "denoiser", "vae_decoder"]


@pytest.fixture
def bundle(bundle_of, tmp_path) -> Bundle:
    """A copy to compile into. Qwen-Image's conditioner takes no time at all."""
    return Bundle.open(shutil.copytree(bundle_of("qwen-image", "bf16"), tmp_path / "bundle"))


@pytest.fixture
def compiled(compiler, bundle) -> Bundle:
    """With its conditioner compiled."""
    compile_conditioner(bundle)
    return Bundle.open(bundle.root)


def compile_conditioner(bundle: Bundle, shapes: ServedShapes = SMALL, **options: Any) -> compiling.CompiledComponent:
    (done,) = compile_bundle(bundle.root, shapes=shapes, components=["conditioner"], **options)
    return done


def content(root: Path) -> dict[str, bytes]:
    """All that lies in a folder."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def never(*given: Any) -> None:
    raise AssertionError("nothing is to be compiled")


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_a_whole_bundle(family, compiler, bundle_of, tmp_path):
    original = bundle_of(family, "bf16")
    root, seen = shutil.copytree(original, tmp_path / "bundle"), []
    done = compile_bundle(root, shapes=SMALL, report=lambda *given: seen.append(given))
    bundle = Bundle.open(root)
    bundle.verify(afresh=True)
    assert [entry.engine for entry in done] == list(bundle.manifest.engines)
    assert [engine.component for engine in bundle.manifest.engines] == COMPONENTS
    assert {stage for stage, _, _ in seen} == {f"compile {name}" for name in COMPONENTS}
    folder = f"engines/tensorrt_rtx-{compiler.__version__}-any"
    for entry in done:
        engine = entry.engine
        assert (engine.backend, engine.compiler, engine.version) == ("tensorrt", "tensorrt_rtx", compiler.__version__)
        assert engine.device == "any"
        assert engine.source == bundle.source_hash(engine.component)
        assert Path(engine.file).parent.as_posix() == folder
        assert (bundle.root / engine.file).stat().st_size == bundle.manifest.files[engine.file].size > 1000
        assert entry.is_new and entry.plan
        assert sum(engine.attention) == {"conditioner": int(family == "z-image"), "vae_decoder": 1}.get(
            engine.component, 3 if engine.component == "denoiser" and family == "z-image" else 2
        )
        assert engine.component == "vae_decoder" or engine.attention[1] == 0
        dims = {dim for spec in bundle.component(engine.component).inputs.values() for dim in spec.shape}
        assert [set(profile) for profile in engine.profiles] == [{dim for dim in dims if isinstance(dim, str)}]
    assert set(content(root)) == {MANIFEST, *bundle.manifest.files}
    # What was there is as it was, and the bundle draws as before.
    before = content(original)
    assert {name: data for name, data in content(root).items() if name in before and name != MANIFEST} == {
        name: data for name, data in before.items() if name != MANIFEST
    }
    call = {"height": 64, "width": 64, "num_inference_steps": 1, "seed": 0, "output_type": "np"}
    with Pipeline.open(root) as ours, Pipeline.open(original) as theirs:
        np.testing.assert_array_equal(ours("x", **call).images, theirs("x", **call).images)


def test_a_second_time_nothing_is_compiled(compiled, monkeypatch):
    before = content(compiled.root)
    monkeypatch.setattr(compiling, "compile_plan", never)
    done = compile_conditioner(compiled)
    assert (done.is_new, done.plan, done.engine) == (False, None, compiled.manifest.engines[0])
    assert content(compiled.root) == before


@pytest.mark.parametrize("change", [{"force": True}, {"shapes": OTHER}, {"weight_streaming_budget": 1 << 20}])
def test_an_engine_is_replaced(compiled, change):
    (old,) = compiled.manifest.engines
    assert compile_conditioner(compiled, **change).is_new
    again = Bundle.open(compiled.root)
    (engine,) = again.manifest.engines
    assert engine.file != old.file
    assert set(content(again.root)) == {MANIFEST, *again.manifest.files}
    if change != {"force": True}:
        assert engine != msgspec.structs.replace(old, file=engine.file)
        assert not compile_conditioner(compiled, **change).is_new
        assert compile_conditioner(compiled).is_new


def test_engines_for_other_devices_and_backends_stay(compiled):
    (ours,) = compiled.manifest.engines
    others = []
    for change in ({"device": "sm90"}, {"version": "9"}, {"compiler": "tensorrt"}, {"backend": "tensorrt-rtx"}):
        file, data = f"engines/{len(others)}.plan", f"engines/{len(others)}.data"
        for name in (file, data):
            (compiled.root / name).write_bytes(name.encode())
        others.append(msgspec.structs.replace(ours, file=file, data=data, **change))
    register_engines(compiled, others)
    compile_conditioner(compiled, force=True)
    again = Bundle.open(compiled.root)
    assert list(again.manifest.engines[:4]) == others
    assert again.manifest.engines[4].file != ours.file
    # One of two files is replaced with the other.
    register_engines(again, [msgspec.structs.replace(others[0], data=None, file="engines/1.plan")])
    assert not (again.root / "engines/0.data").exists()


def test_stray_files_go(compiled):
    names = ["engines/x.part", "engines/tensorrt_rtx-9-any/denoiser-0.plan"]
    for name in names:
        path = compiled.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"left by a killed compilation")
    before = content(compiled.root)
    compile_conditioner(compiled)
    assert content(compiled.root) == {name: data for name, data in before.items() if name not in names}


def test_changed_weights_make_an_engine_stale(compiled):
    (weights,) = compiled.component("conditioner").weights
    path = compiled.root / weights
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="was changed: its hash is not the manifest's"):
        compile_conditioner(compiled)
    write_manifest(compiled.root, msgspec.structs.replace(compiled.manifest, files=record_files(compiled.root)))
    changed = Bundle.open(compiled.root)
    (stale,) = changed.manifest.engines
    assert stale.source != changed.source_hash("conditioner")
    done = compile_conditioner(changed)
    assert done.is_new and done.engine.source == changed.source_hash("conditioner")
    assert [engine.file for engine in Bundle.open(compiled.root).manifest.engines] == [done.engine.file]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (BackendError("TensorRT cannot compile text_encoder: no kernel"), BackendError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
    ],
)
def test_failing_half_way_keeps_what_was_done(compiler, bundle, monkeypatch, error, raised):
    real, names = compiling.compile_plan, ["conditioner", "text_encoder"]

    def fail(graph: Any, component: Any, profiles: Any, file: Path, *given: Any) -> Any:
        if graph.component == "text_encoder":
            file.write_bytes(b"half of a plan")
            raise error
        return real(graph, component, profiles, file, *given)

    before = content(bundle.root)
    monkeypatch.setattr(compiling, "compile_plan", fail)
    with pytest.raises(raised):
        compile_bundle(bundle.root, shapes=SMALL, components=names)
    again = Bundle.open(bundle.root)
    (engine,) = again.manifest.engines
    assert engine.component == "conditioner"
    assert set(content(bundle.root)) == {*before, engine.file}
    # The next run goes on from there.
    monkeypatch.setattr(compiling, "compile_plan", real)
    done = compile_bundle(bundle.root, shapes=SMALL, components=names)
    assert [entry.is_new for entry in done] == [False, True]


def test_a_full_disk(compiled, monkeypatch):
    before, write = content(compiled.root), Path.write_bytes

    def fill(path: Path, data: Any) -> int:
        if path.suffix == ".part":
            write(path, bytes(data)[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(OutputError, match=r"\.plan cannot be written \(No space left on device\); free some space"):
        compile_conditioner(compiled, force=True)
    assert content(compiled.root) == before


def test_a_disk_that_is_full_for_the_manifest(compiled, monkeypatch):
    def fill(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = content(compiled.root)
    monkeypatch.setattr(compiling, "write_manifest", fill)
    with pytest.raises(OutputError, match="No space left on device"):
        compile_conditioner(compiled, force=True)
    assert content(compiled.root) == before


def test_interrupted_after_the_manifest_was_written(compiled, monkeypatch):
    """What the manifest names by then is there."""

    def stop(bundle: Bundle) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bundle, "trust", stop)
    with pytest.raises(KeyboardInterrupt):
        compile_conditioner(compiled, force=True)
    again = Bundle.open(compiled.root)
    assert again.manifest.engines != compiled.manifest.engines
    assert set(content(again.root)) == {MANIFEST, *again.manifest.files}


def hold(root: Path, held: Any, let_go: Any) -> None:
    with only_writer_of(root):
        held.set()
        let_go.wait(60)


def test_another_process_writes_it(compiled):
    context = multiprocessing.get_context("spawn")
    held, let_go = context.Event(), context.Event()
    process = context.Process(target=hold, args=(compiled.root, held, let_go))
    process.start()
    try:
        assert held.wait(60)
        part = compiled.root / "engines" / "its.part"
        part.write_bytes(b"being written")
        with pytest.raises(OutputError, match="another process is writing"):
            compile_conditioner(compiled, force=True)
        assert part.exists()
    finally:
        let_go.set()
        process.join()


def test_what_another_process_finished_while_this_one_started_is_no_stray(compiled, monkeypatch):
    """The bundle is read under the lock, not before."""
    (first,) = compiled.manifest.engines
    lock, open_bundle = compiling.only_writer_of, Bundle.open
    opened = []
    monkeypatch.setattr(Bundle, "open", lambda *given, **named: opened.append(given) or open_bundle(*given, **named))

    def late(path: Path) -> Any:
        assert not opened
        file = first.file.replace("conditioner", "denoiser")
        shutil.copy(compiled.root / first.file, compiled.root / file)
        register_engines(compiled, [msgspec.structs.replace(first, component="denoiser", file=file)])
        return lock(path)

    monkeypatch.setattr(compiling, "only_writer_of", late)
    compile_conditioner(compiled)
    assert [engine.component for engine in open_bundle(compiled.root).manifest.engines] == ["conditioner", "denoiser"]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"components": ["unet"]},
            UsageError,
            "has no graph called 'unet'; it has text_encoder, condi",
        ),
        ({"components": ["conditioner", "modulation"]}, UsageError, "no graph called 'modulation'"),
        ({"weight_streaming_budget": -1}, UsageError, "the weight streaming budget is -1; give 0 bytes or more"),
        ({"shapes": ServedShapes(sizes=((100, 64),))}, UsageError, "100x64 cannot be drawn"),
        (
            {"backend": "tensorrt-rtx", "options": CompilerOptions(stripped=True)},
            UsageError,
            "the tensorrt-rtx backend has no",
        ),
        (
            {"backend": "tensorrt-rtx", "weight_streaming_budget": 5},
            UsageError,
            "leave them out, or use --backend",
        ),
    ],
)
def test_wrong_use(bundle, monkeypatch, options, kind, message):
    before = content(bundle.root)
    monkeypatch.setattr(compiling, "compile_plan", never)
    with pytest.raises(kind) as caught:
        compile_bundle(bundle.root, **options)
    assert message in str(caught.value)
    assert content(bundle.root) == before


def test_a_folder_that_is_no_bundle(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(BundleError, match="is not a bundle"):
            compile_bundle(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_tensorrt_is_not_installed(bundle, monkeypatch):
    before = content(bundle.root)
    monkeypatch.setattr(tensorrt_api, "MODULES", ("tensorrt_of_nowhere",))
    with pytest.raises(BackendError, match=rf"TensorRT is not installed; {re.escape(install('tensorrt'))}"):
        compile_bundle(bundle.root)
    assert content(bundle.root) == before


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"gpus": 0}, "there is no NVIDIA GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"),
        ({"driver": 0}, "there is no NVIDIA driver; install one"),
        ({"driver": 12040}, "the NVIDIA driver serves CUDA up to 12.4, and cuda-bindings is of 13"),
    ],
)
def test_tensorrt_without_a_gpu(bundle, monkeypatch, machine, message):
    """The module is there, and compiles only where the engine will run."""
    before = content(bundle.root)
    fake_tensorrt.install(monkeypatch, **machine)
    with pytest.raises(BackendError, match=message):
        compile_bundle(bundle.root)
    assert content(bundle.root) == before


def test_what_is_compiled_for(compiler, monkeypatch):
    assert find_target() == Target("tensorrt_rtx", compiler.__version__, "any")
    stub = ModuleType("tensorrt")
    stub.__version__ = "11.4.0.106"  # type: ignore[attr-defined]
    monkeypatch.setattr(tensorrt_api, "load", lambda: stub)
    monkeypatch.setattr(cuda, "open_device", lambda: cuda.Device(0, "sm90", "NVIDIA H100 80GB HBM3"))
    target = find_target()
    assert target.folder == "engines/tensorrt-11.4.0.106-sm90"
    path = timing_cache(target)
    assert path.name == "tensorrt-11.4.0.106-sm90-nvidia-h100-80gb-hbm3.cache"


def test_what_was_measured_is_kept_for_each_gpu(compiler, bundle, monkeypatch):
    """Of TensorRT; what TensorRT for RTX compiles is for all GPUs."""
    asked = []

    def stop(graph: Any, component: Any, profiles: Any, file: Path, options: CompilerOptions, report: Any) -> None:
        asked.append(options)
        raise BackendError("enough")

    monkeypatch.setattr(compiling, "compile_plan", stop)
    gpu = Target("tensorrt", "11.4", "sm90", "NVIDIA H100")
    for target, given in (
        (gpu, CompilerOptions()),
        (gpu, CompilerOptions(timing_cache=Path("mine"))),
        (None, CompilerOptions()),
    ):
        with monkeypatch.context() as patch, pytest.raises(BackendError):
            if target:
                patch.setattr(compiling, "find_target", lambda: gpu)
            compile_bundle(bundle.root, options=given, weight_streaming_budget=10)
    assert [options.timing_cache for options in asked] == [timing_cache(gpu), Path("mine"), None]
    assert all(options.weight_streaming for options in asked)


@pytest.mark.parametrize(
    ("least", "budget", "streamable"), [(1, None, True), (1 << 40, None, False), (1 << 40, 5, True)]
)
def test_plans_of_large_components_can_stream_their_weights(bundle, monkeypatch, least, budget, streamable):
    asked = []

    def stop(graph: Any, component: Any, profiles: Any, file: Path, options: CompilerOptions, report: Any) -> None:
        asked.append(options.weight_streaming)
        raise BackendError("enough")

    monkeypatch.setattr(compiling, "compile_plan", stop)
    monkeypatch.setattr(compiling, "STREAMED_FROM", least)
    with pytest.raises(BackendError, match="enough"):
        compile_bundle(bundle.root, components=["conditioner"], weight_streaming_budget=budget)
    assert asked == [streamable]
