"""The TensorRT backend's own code, run end to end against an imitation of TensorRT and CUDA that notices misuse."""

from __future__ import annotations

import gc
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper

from tests import fake_tensorrt, handmade
from tests.fake_tensorrt import Machine, Misuse, compile_bundle
from zimgkit.engines.base import Engine, Handle, open_engine
from zimgkit.engines.bundle import Bundle, CompiledEngine, Component, Refit, TensorSpec, record_files, write_manifest
from zimgkit.engines.errors import BackendError, BundleError, OutOfMemoryError, UsageError, install
from zimgkit.engines.tensorrt import api as tensorrt_api
from zimgkit.engines.tensorrt import engine as tensorrt
from zimgkit.engines.tensorrt import plan as tensorrt_plan
from zimgkit.engines.tensors import safetensors
from zimgkit.runtime import Pipeline

WEIGHT = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
INPUTS = {
    "x": TensorSpec("float32", ("tokens", 4)),
    "scale": TensorSpec("float32", (1,)),
    "rows": TensorSpec("int64", ("tokens",)),
    "mask": TensorSpec("bool", ("tokens", 1)),
}
OUTPUTS = {"y": TensorSpec("float32", ("tokens", 6)), "longer": TensorSpec("float32", ("2*tokens", 6))}
LENGTHS = {"tokens": (1, 4, 16)}


def write(root: Path) -> Path:
    """A bundle of y = mask * scale * (x weight)[rows], and y twice over; its weight is in a safetensors file."""
    root.mkdir(parents=True)
    info = safetensors.write(root / "w.safetensors", {"weight": ("float32", (4, 6))}, {"weight": [WEIGHT]})["weight"]
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=info.shape)
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": info.file.name, "offset": info.offset, "length": info.nbytes}.items():
        weight.external_data.add(key=key, value=str(value))
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("Gather", ["product", "rows"], ["taken"]),
        helper.make_node("Mul", ["taken", "scale"], ["scaled"]),
        helper.make_node("Cast", ["mask"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["scaled", "factor"], ["y"]),
        helper.make_node("Concat", ["y", "y"], ["longer"], axis=0),
    ]
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
    ends = [
        [helper.make_tensor_value_info(name, kinds[spec.dtype], spec.shape) for name, spec in specs.items()]
        for specs in (INPUTS, OUTPUTS)
    ]
    graph = helper.make_graph(nodes, "net", *ends, initializer=[weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    files = {"w.safetensors": (root / "w.safetensors").read_bytes(), "net.onnx": model.SerializeToString()}
    net = Component(("w.safetensors",), {"float32": "net.onnx"}, INPUTS, OUTPUTS, weight_bytes=96)
    table = Component(("w.safetensors",), tensors=("weight",))
    return handmade.write_bundle(root, files, components={"net": net, "table": table})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield fake_tensorrt.install(monkeypatch, gpus=2)
    gc.collect()  # Engines go while the imitation is there.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "bundle")


@pytest.fixture
def bundle(root: Path) -> Bundle:
    return compile_bundle(root, [LENGTHS])


@pytest.fixture
def engine(machine: Machine, bundle: Bundle) -> Iterator[Engine]:
    engine = open_engine(bundle, "net", "tensorrt")
    yield engine
    engine.close()


def feeds(tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "x": generator.standard_normal((tokens, 4)).astype(np.float32),
        "scale": generator.standard_normal(1).astype(np.float32),
        "rows": generator.integers(0, tokens, tokens),
        "mask": generator.integers(0, 2, (tokens, 1)).astype(bool),
    }


def assert_right(found: dict[str, np.ndarray], given: dict[str, np.ndarray]) -> None:
    y = given["mask"] * given["scale"] * (given["x"] @ WEIGHT)[given["rows"]]
    assert list(found) == ["y", "longer"]
    assert all(value.dtype == np.float32 for value in found.values())
    np.testing.assert_allclose(found["y"], y, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["longer"], np.concatenate([found["y"], found["y"]]))


def calls_of(machine: Machine, act: Callable[[], Any]) -> list[str]:
    machine.calls.clear()
    act()
    return list(machine.calls)


class TestRuns:
    def test_shapes_in_any_order(self, engine):
        """Buffers that grow, are large enough, or are used by a recorded run."""
        assert (engine.inputs, engine.outputs) == (INPUTS, OUTPUTS)
        for seed, tokens in enumerate([1, 1, 1, 5, 5, 5, 2, 1, 1, 1, 16, 5, 5, 5, 16, 16, 16, 3]):
            given = feeds(tokens, seed)
            assert_right(engine.run(given), given)

    @pytest.mark.parametrize("seed", range(5))
    def test_at_random(self, engine, seed):
        """Arrays and uploads, mixed; uploads stay for a while, and are dropped."""
        generator = np.random.default_rng(seed)
        kept: list[tuple[dict[str, np.ndarray], Any]] = []
        for step in range(60):
            if not kept or generator.random() < 0.15:
                given = feeds(int(generator.integers(1, 17)), step)
                names = [name for name in INPUTS if generator.random() < 0.5]
                kept.append((given, engine.upload({name: given[name] for name in names})))
            if len(kept) > 3:
                kept.pop(int(generator.integers(len(kept))))
            given, uploaded = kept[generator.integers(len(kept))]
            fresh = feeds(len(given["x"]), 1000 + step)
            mixed = {name: given[name] if name in uploaded else fresh[name] for name in INPUTS}
            assert_right(engine.run({**mixed, **uploaded}), mixed)

    def test_results_are_the_callers_own(self, engine):
        first, second = feeds(3, 1), feeds(3, 2)
        found = engine.run(first)
        kept = {name: value.copy() for name, value in found.items()}
        engine.run(second)
        for name, value in kept.items():
            np.testing.assert_array_equal(found[name], value)
            assert found[name].flags.owndata

    def test_inputs_that_lie_strided_in_memory(self, engine):
        given = feeds(5) | {"x": np.asfortranarray(feeds(10)["x"])[::2], "rows": np.arange(10)[::-2] // 2}
        assert not given["x"].flags.c_contiguous
        assert_right(engine.run(given), given)
        assert_right(engine.run({**given, **engine.upload({"x": given["x"]})}), given)

    def test_what_was_uploaded_is_not_the_callers_array(self, engine):
        given = feeds(4)
        uploaded = engine.upload({"x": given["x"]})
        kept = given["x"].copy()
        given["x"][...] = 7
        assert_right(engine.run({**given, **uploaded}), given | {"x": kept})

    def test_uploads_are_not_copied_again(self, engine, machine):
        given = feeds(4)
        uploaded = engine.upload(given)
        calls = calls_of(machine, lambda: engine.run(uploaded))
        assert calls.count("cudaMemcpyAsync") == len(OUTPUTS)
        assert_right(engine.run(uploaded), given)

    def test_the_second_gpu(self, bundle, machine):
        given = feeds(2)
        engine = open_engine(bundle, "net", "tensorrt", "cuda:1")
        machine.current = 0  # As another engine, or another thread, has it.
        assert_right(engine.run(given), given)
        assert machine.current == 1

    def test_of_a_bundle_without_ranges(self, root, machine):
        engine = open_engine(compile_bundle(root), "net", "tensorrt")
        assert_right(engine.run(feeds(1000)), feeds(1000))


class TestWhatIsNotDoneAgain:
    def test_shapes_and_addresses_are_set_once(self, engine, machine):
        given = feeds(4)
        first = calls_of(machine, lambda: engine.run(given))
        assert first.count("set_input_shape") == len(INPUTS)
        assert first.count("set_tensor_address") == len(INPUTS) + len(OUTPUTS)
        engine.run(feeds(4)), engine.run(feeds(4))
        # A shorter one in the same buffers.
        shorter = calls_of(machine, lambda: engine.run(feeds(3)))
        assert shorter.count("set_input_shape") == len(INPUTS) - 1  # The scale has kept its shape.
        assert "set_tensor_address" not in shorter
        assert "cudaMalloc" not in shorter
        assert "cudaMallocHost" not in shorter
        assert shorter.count("cudaStreamSynchronize") == 1

    def test_the_second_run_is_recorded_and_the_third_replayed(self, engine, machine):
        runs = [calls_of(machine, lambda: engine.run(feeds(4))) for _ in range(4)]
        launches = [calls.count("cudaGraphLaunch") for calls in runs]
        captures = [calls.count("cudaStreamBeginCapture") for calls in runs]
        enqueued = [calls.count("execute_async_v3") for calls in runs]
        assert (launches, captures, enqueued) == ([0, 0, 1, 1], [0, 1, 0, 0], [1, 2, 0, 0])
        copies = ["cudaMemcpyAsync"] * len(INPUTS)
        back = ["cudaMemcpyAsync"] * len(OUTPUTS)
        assert runs[3] == ["cudaSetDevice", *copies, "cudaGraphLaunch", *back, "cudaStreamSynchronize"]

    def test_guidance_alternates_between_two_graphs(self, engine, machine):
        given = [feeds(4, 1), feeds(7, 2)]
        branches = [engine.upload({"rows": g["rows"], "mask": g["mask"]}) for g in given]
        for step in range(5):
            for index, (own, constants) in enumerate(zip(given, branches, strict=True)):
                fresh = own | {"x": feeds(len(own["x"]), 10 * step + index)["x"]}
                calls = calls_of(machine, lambda f=fresh, c=constants: assert_right(engine.run({**f, **c}), f))
                # The longer one came second, so that buffers grew, and the shorter one had to begin again.
                assert ("cudaGraphLaunch" in calls) == (step >= (3 if index == 0 else 2))
        assert len(machine.executables) == 2
        assert machine.contexts == 3

    def test_the_next_call_finds_the_graphs_of_the_last(self, engine, machine):
        """Uploads of the same kind take the places of those that were dropped."""
        for call in range(3):
            given = feeds(4, call)
            uploaded = engine.upload({"scale": given["scale"], "mask": given["mask"]})
            for _ in range(3):
                assert_right(engine.run({**given, **uploaded}), given)
            del uploaded
        assert machine.count("cudaGraphInstantiate") == 1

    def test_only_some_graphs_are_kept(self, engine, machine):
        engine.run(feeds(16))
        for tokens in range(1, 13):
            for _ in range(2):
                engine.run(feeds(tokens))
            assert len(machine.executables) <= tensorrt.MAX_GRAPHS
        assert len(machine.executables) == tensorrt.MAX_GRAPHS
        assert not machine.graphs
        for tokens in (12, 11, 10, 9):
            assert "cudaGraphLaunch" in calls_of(machine, lambda t=tokens: assert_right(engine.run(feeds(t)), feeds(t)))

    def test_graphs_go_with_the_memory_they_use(self, engine, machine, bundle):
        given = feeds(4)
        uploaded = engine.upload({"x": given["x"]})
        for _ in range(3):
            engine.run({**given, **uploaded})
        assert len(machine.executables) == 1
        del uploaded
        assert_right(engine.run(given), given)
        assert len(machine.executables) == 1  # For the memory waits to be used again.
        open_engine(bundle, "net", "tensorrt").close()
        assert_right(engine.run(given), given)
        assert len(machine.executables) == 1  # That of this run.
        assert machine.count("cudaGraphExecDestroy") == 1
        engine.run(feeds(9))  # Larger: every buffer is another.
        assert not machine.executables


class TestKeptOutputs:
    def test_a_replayed_run_does_not_write_into_them(self, engine, machine):
        kept = []
        for seed in range(6):
            given = feeds(4, seed)
            found = engine.run(given, keep=["y"])
            assert isinstance(found["y"], Handle)
            kept.append((given, found))
        assert machine.count("cudaGraphLaunch") == 4
        for given, found in kept:
            assert_right({"y": engine.download(found["y"]), "longer": found["longer"]}, given)

    def test_they_cross_no_bus(self, engine, machine):
        given = feeds(4)
        calls = calls_of(machine, lambda: engine.run(given, keep=OUTPUTS))
        assert calls.count("cudaMallocHost") == len(INPUTS)
        assert calls.count("cudaMemcpyAsync") == len(INPUTS) + len(OUTPUTS)

    def test_dropped_ones_make_place_for_the_next(self, engine, machine):
        """So that runs of a second engine on what a first one gives are replayed."""
        for seed in range(5):
            engine.run(feeds(4, seed), keep=["y"])
        before = machine.used
        calls = calls_of(machine, lambda: engine.run(feeds(4), keep=["y"]))
        assert machine.used == before
        assert "cudaMalloc" not in calls

    def test_too_little_memory_for_them(self, bundle, machine):
        engine = open_engine(bundle, "net", "tensorrt")
        engine.run(feeds(16))
        machine.memory = machine.used
        machine.calls.clear()
        with pytest.raises(OutOfMemoryError):
            engine.run(feeds(16), keep=["y"])
        assert "execute_async_v3" not in machine.calls  # Nothing has begun.
        assert_right(engine.run(feeds(16)), feeds(16))


class TestRecordingThatFails:
    @pytest.mark.parametrize("step", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
    def test_in_cuda(self, engine, machine, step):
        machine.fail[step] = 900
        for seed in range(5):
            assert_right(engine.run(feeds(4, seed)), feeds(4, seed))
        assert machine.count(step) == 1  # It is not tried again.
        assert machine.count("cudaGraphLaunch") == 0
        assert not machine.graphs

    def test_in_tensorrt(self, engine, machine):
        machine.reject.add("capture")
        for tokens in (4, 4, 4, 5, 5, 5):
            assert_right(engine.run(feeds(tokens)), feeds(tokens))
        assert machine.count("cudaStreamBeginCapture") == 1
        assert not machine.graphs

    def test_what_tensorrt_said_of_it_is_not_told_later(self, engine, machine):
        machine.reject.add("capture")
        engine.run(feeds(4)), engine.run(feeds(4))
        machine.reject = {"execute_async_v3"}
        with pytest.raises(BackendError, match=r"\[execute_async_v3\] it was told to refuse"):
            engine.run(feeds(4))

    def test_for_want_of_a_context(self, engine, machine):
        engine.run(feeds(4))
        machine.reject.add("create_execution_context")
        for _ in range(3):
            assert_right(engine.run(feeds(4)), feeds(4))
        assert machine.count("cudaStreamBeginCapture") == 0

    def test_interrupted(self, engine, machine, monkeypatch):
        engine.run(feeds(4))
        with monkeypatch.context() as patch:
            patch.setattr(tensorrt._Context, "enqueue", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                engine.run(feeds(4))
        for _ in range(3):
            assert_right(engine.run(feeds(4)), feeds(4))


class TestProfiles:
    PROFILES = ({"tokens": (1, 8, 16)}, {"tokens": (4, 4, 4)}, {"tokens": (2, 4, 8)})

    @pytest.mark.parametrize(("tokens", "index"), [(1, 0), (4, 1), (3, 2), (8, 2), (9, 0), (16, 0)])
    def test_the_narrowest_serves(self, root, machine, tokens, index):
        engine = open_engine(compile_bundle(root, self.PROFILES), "net", "tensorrt")
        assert_right(engine.run(feeds(tokens)), feeds(tokens))
        assert engine._context._context.profile == index

    def test_back_and_forth(self, root, machine):
        engine = open_engine(compile_bundle(root, self.PROFILES), "net", "tensorrt")
        for seed, tokens in enumerate([4, 1, 4, 8, 4, 4, 9, 1, 1, 1, 4, 4]):
            assert_right(engine.run(feeds(tokens, seed)), feeds(tokens, seed))

    def test_none_serves(self, engine, bundle):
        with pytest.raises(BackendError) as caught:
            engine.run(feeds(17))
        assert str(caught.value) == (
            "net was compiled for 1 to 16 tokens, not for 'x' of shape (17, 4); "
            f"compile it for this too: zimg-export compile {bundle.root} --backend tensorrt"
        )
        assert_right(engine.run(feeds(16)), feeds(16))

    def test_a_dimension_has_one_size(self, engine):
        with pytest.raises(BackendError, match="net got 'rows' of 5 tokens, and another input of 4"):
            engine.run(feeds(4) | {"rows": np.zeros(5, np.int64)})


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x": np.zeros((2, 5), np.float32)}, r"net takes 'x' in the shape \('tokens', 4\), not \(2, 5\)"),
            ({"x": np.zeros((2, 4))}, "net takes 'x' in float32, not float64"),
            ({"rows": np.zeros(2, np.int32)}, "net takes 'rows' in int64, not int32"),
            ({"z": np.zeros(1)}, "net has no input 'z'; it has x, scale, rows, mask"),
            ({"x": object()}, "net takes 'x' as a numpy array, or as a handle of tensorrt on cuda:0, not as object"),
            (
                {"x": [[1, 2, 3, 4]]},
                "as a handle of tensorrt on cuda:0, not as list",
            ),
            (
                {"x": np.zeros((0, 4), np.float32), "rows": np.zeros(0, np.int64), "mask": np.zeros((0, 1), bool)},
                "1 to",
            ),
        ],
    )
    @pytest.mark.parametrize("upload", [False, True])
    def test_feeds(self, engine, machine, changes, message, upload):
        if upload:
            arrays = {name: value for name, value in changes.items() if isinstance(value, np.ndarray)}
            changes = {**changes, **engine.upload(arrays)}
        machine.calls.clear()
        with pytest.raises(BackendError, match=message):
            engine.run(feeds(2) | changes)
        assert set(machine.calls) <= {"cudaSetDevice"}
        assert_right(engine.run(feeds(2)), feeds(2))

    def test_a_missing_input(self, engine):
        with pytest.raises(BackendError, match="net needs the input 'scale'"):
            engine.run({"x": feeds(2)["x"]})

    def test_an_upload_to_another_gpu(self, engine, bundle):
        other = open_engine(bundle, "net", "tensorrt", "cuda:1")
        with pytest.raises(BackendError, match="net runs with tensorrt on cuda:0, and got 'x' of tensorrt on cuda:1"):
            engine.run({**feeds(2), **other.upload({"x": feeds(2)["x"]})})

    @pytest.mark.parametrize("device", ["cpu", "gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", "cuda:99999"])
    def test_devices(self, bundle, machine, device):
        with pytest.raises(UsageError) as caught:
            open_engine(bundle, "net", "tensorrt", device)
        assert str(caught.value) == f"TensorRT has no device {device!r}; choose cuda or cuda:N"

    def test_a_device_that_is_not_there(self, bundle, machine):
        with pytest.raises(BackendError, match="there is no device cuda:2; choose one of cuda:0, cuda:1"):
            open_engine(bundle, "net", "tensorrt", "cuda:2")

    def test_a_table(self, bundle, machine):
        with pytest.raises(BackendError, match="table is a table of tensors and has no graph to run"):
            open_engine(bundle, "table", "tensorrt")

    def test_no_such_component(self, bundle, machine):
        with pytest.raises(BundleError, match="no component 'nothing'"):
            open_engine(bundle, "nothing", "tensorrt")


class TestMachinesThatLackSomething:
    @pytest.mark.parametrize(
        ("lack", "message"),
        [
            ({"driver": 0}, "there is no NVIDIA driver"),
            ({"driver": 12080}, r"serves CUDA up to 12\.8, and cuda-bindings is of 13\.0; update the driver"),
            ({"gpus": 0}, "there is no NVIDIA GPU"),
        ],
    )
    def test_driver_and_gpu(self, bundle, machine, lack, message):
        """The imitation's runtime crashes where there is no driver, as the real one does."""
        for name, value in lack.items():
            setattr(machine, name, value)
        with pytest.raises(BackendError, match=message):
            open_engine(bundle, "net", "tensorrt")

    def test_tensorrt(self, bundle, machine, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(BackendError, match=rf"TensorRT is not installed; {re.escape(install('tensorrt'))}"):
            open_engine(bundle, "net", "tensorrt")

    def test_bindings(self, bundle, machine, monkeypatch):
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(BackendError, match="CUDA's Python bindings are not installed"):
            open_engine(bundle, "net", "tensorrt")


class TestChoiceOfThePlan:
    @pytest.mark.parametrize(
        "entry", [{"version": "11.3.0"}, {"device": "sm89"}, {"compiler": "tensorrt_rtx", "device": "any"}]
    )
    def test_of_another_machine(self, root, machine, entry):
        made = {"compiler": "tensorrt", "version": fake_tensorrt.VERSION, "device": "sm90"} | entry
        bundle = compile_bundle(root, [LENGTHS], **entry)
        with pytest.raises(BackendError) as caught:
            open_engine(bundle, "net", "tensorrt")
        assert str(caught.value) == (
            f"the TensorRT engines of net are for {made['compiler']} {made['version']} on {made['device']}; this "
            f"machine has tensorrt 11.4.0.106 on sm90; "
            f"compile it here: zimg-export compile {bundle.root} --backend tensorrt"
        )

    @pytest.mark.parametrize("entry", [{}, {"backend": "tensorrt-rtx"}])
    def test_none_at_all(self, root, machine, entry):
        bundle = compile_bundle(root, [LENGTHS], **entry) if entry else Bundle.open(root)
        with pytest.raises(BackendError) as caught:
            open_engine(bundle, "net", "tensorrt")
        assert str(caught.value) == (
            f"{bundle.root} has no TensorRT engine of net; "
            f"compile it here: zimg-export compile {bundle.root} --backend tensorrt"
        )

    def test_stale(self, root, machine):
        bundle = compile_bundle(root, [LENGTHS], source="0" * 64)
        with pytest.raises(BackendError) as caught:
            open_engine(bundle, "net", "tensorrt")
        assert str(caught.value) == (
            "the TensorRT engine of net was compiled from another graph or other weights than it has now; "
            f"compile it here: zimg-export compile {bundle.root} --backend tensorrt"
        )

    def test_the_one_that_fits_is_taken(self, root, machine):
        """Among stale ones, others' and one for any GPU, that for this very one."""
        bundle = compile_bundle(root, [LENGTHS])
        (good,) = bundle.manifest.engines
        change = msgspec.structs.replace
        (root / "engines/wrong.plan").write_bytes(b"not to be loaded")
        wrong = change(good, file="engines/wrong.plan")
        engines = (
            change(wrong, device="sm89"),
            change(wrong, version="1.0"),
            change(wrong, source="stale"),
            change(wrong, device="any"),
            good,
        )
        write_manifest(root, change(bundle.manifest, engines=engines, files=record_files(root)))
        assert_right(open_engine(Bundle.open(root), "net", "tensorrt").run(feeds(3)), feeds(3))

    def test_tensorrt_for_rtx(self, root, monkeypatch):
        """The other product: the same API, engines for any GPU, kernels compiled before they are recorded."""
        bundle = compile_bundle(root, [LENGTHS], compiler="tensorrt_rtx", version="1.7.1", device="any")
        machine = fake_tensorrt.install(monkeypatch, compiler="tensorrt_rtx", version="1.7.1", capability=(8, 9))
        engine = open_engine(bundle, "net", "tensorrt")
        for seed in range(4):
            assert_right(engine.run(feeds(3, seed)), feeds(3, seed))
        assert machine.count("cudaGraphLaunch") == 2
        engine.close()


class TestPlansThatDoNotLoad:
    def change(self, root: Path, content: bytes) -> Bundle:
        bundle = compile_bundle(root, [LENGTHS])
        (root / "engines/net.plan").write_bytes(content)
        write_manifest(root, msgspec.structs.replace(bundle.manifest, files=record_files(root)))
        return Bundle.open(root)

    def test_garbage(self, root, machine):
        bundle = self.change(root, b"garbage")
        with pytest.raises(BackendError) as caught:
            open_engine(bundle, "net", "tensorrt")
        path = bundle.root / "engines/net.plan"
        assert str(caught.value) == (
            f"TensorRT cannot load {path}: IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magic tag); "
            f"compile it again: zimg-export compile {bundle.root} --backend tensorrt"
        )

    def test_empty(self, root, machine):
        with pytest.raises(BundleError, match=r"net\.plan is empty; compile it again: zimg-export compile"):
            open_engine(self.change(root, b""), "net", "tensorrt")

    def test_changed_on_disk(self, bundle, root, machine):
        path = root / "engines/net.plan"
        path.write_bytes(path.read_bytes()[:-1] + b" ")
        with pytest.raises(BundleError, match=r"net\.plan was changed"):
            Bundle.open(root)

    def test_gone(self, bundle, root, machine):
        (root / "engines/net.plan").unlink()
        with pytest.raises(BundleError, match=r"net\.plan is missing"):
            open_engine(bundle, "net", "tensorrt")

    @pytest.mark.parametrize(
        "plan",
        [
            {"inputs": {"x": ["float32", ["tokens", 4]]}},
            {"outputs": {"y": ["bfloat16", ["tokens", 6]], "longer": ["float32", ["2*tokens", 6]]}},
            {"outputs": {name: ["float32", ["tokens", 6]] for name in (*OUTPUTS, "more")}},
            {"location": "HOST"},
            {"profiles": [{}, {}]},
        ],
    )
    def test_not_what_the_manifest_says(self, root, machine, plan):
        bundle = compile_bundle(root, [LENGTHS], plan=plan)
        with pytest.raises(BundleError, match=r"net\.plan is not what the manifest of .* describes; compile it again"):
            open_engine(bundle, "net", "tensorrt")
        gc.collect()
        assert machine.used == 0


class TestWeights:
    def test_stripped_plans_take_the_bundles(self, root, machine):
        bundle = compile_bundle(root, [LENGTHS], plan={"refit": ["weight", "inline constant"]}, stripped=True)
        engine = open_engine(bundle, "net", "tensorrt")
        for seed in range(3):
            assert_right(engine.run(feeds(3, seed)), feeds(3, seed))
        assert engine.memory_bytes >= WEIGHT.nbytes

    def test_that_a_plan_refuses(self, root, machine):
        machine.reject.add("refit_cuda_engine")
        bundle = compile_bundle(root, [LENGTHS], plan={"refit": ["weight"]}, stripped=True)
        with pytest.raises(BackendError, match=r"cannot fill the engine of net .*: \[refit_cuda_engine\]"):
            open_engine(bundle, "net", "tensorrt")

    @pytest.fixture
    def swapped(self, root, tmp_path):
        """What gives the bundle a refittable plan that was compiled from other weights than it has now."""
        before = shutil.copytree(root, tmp_path / "before")
        path = before / "w.safetensors"
        path.write_bytes(path.read_bytes()[: -WEIGHT.nbytes] + (2 * WEIGHT).tobytes())

        def make(tensors=("weight",), source=None, **plan):
            plan = {"graph": str(before / "net.onnx"), "refit": ["weight"]} | plan
            if tensors is None:
                return compile_bundle(root, [LENGTHS], plan=plan, refittable=True)
            refit = Refit(source or Bundle.open(root).source_hash("net"), tensors)
            return compile_bundle(root, [LENGTHS], plan=plan, refittable=True, source="0" * 64, refit=refit)

        return make

    def test_a_refitted_plan_has_the_bundles(self, swapped, machine):
        engine = open_engine(swapped(), "net", "tensorrt")
        assert_right(engine.run(feeds(3)), feeds(3))
        assert engine._plan._engine.exchanged == {"weight"}

    def test_without_a_refit_it_has_its_own(self, swapped, machine):
        """Which shows that the imitation has other weights before it is refitted."""
        found = open_engine(swapped(None), "net", "tensorrt").run(feeds(3))
        assert_right({name: value / 2 for name, value in found.items()}, feeds(3))

    def test_refitted_for_other_weights_it_is_stale(self, swapped, machine):
        with pytest.raises(BackendError, match=r"compiled from another graph or other weights .*; compile it here"):
            open_engine(swapped(source="1" * 64), "net", "tensorrt")

    @pytest.mark.parametrize(
        ("tensors", "plan", "message"),
        [
            (("gone",), {}, "cannot take 'gone' from the bundle"),
            (("weight",), {"refit": []}, "cannot give the engine of net the bundle's weight: it gives no reason"),
            (("weight",), {"joined": [["weight", ""]]}, "cannot take 'a weight' from the bundle"),
        ],
    )
    def test_what_cannot_be_exchanged(self, swapped, machine, tensors, plan, message):
        with pytest.raises(BackendError, match=f"{message}.*; compile it again: zimg-export compile"):
            open_engine(swapped(tensors, **plan), "net", "tensorrt")

    @pytest.mark.parametrize("method", ["set_named_weights", "refit_cuda_engine"])
    def test_a_refit_that_is_refused(self, swapped, machine, method):
        machine.reject.add(method)
        with pytest.raises(BackendError, match=rf"give the engine of net the bundle's weights?: \[{method}\]"):
            open_engine(swapped(), "net", "tensorrt")
        gc.collect()
        assert machine.used == 0

    @pytest.mark.parametrize("budget", [None, 0, 500])
    def test_streaming(self, root, machine, budget):
        engine = open_engine(compile_bundle(root, [LENGTHS], weight_streaming_budget=budget), "net", "tensorrt")
        assert engine._plan._engine.weight_streaming_budget_v2 == (800 if budget is None else budget)
        assert_right(engine.run(feeds(3)), feeds(3))

    @pytest.mark.parametrize(
        ("wanted", "free", "kept"),
        [
            (None, 10**9, 800),
            (None, 1300, 300),
            (None, 900, 0),
            (500, 10**9, 500),
            (500, 1300, 300),
            (5000, 10**9, 800),
        ],
    )
    def test_as_many_weights_stay_as_there_is_room_for(self, monkeypatch, wanted, free, kept):
        monkeypatch.setattr(tensorrt_plan, "RESERVED", 100)
        entry = CompiledEngine(
            "net", "net.plan", "tensorrt", "tensorrt", "11", "sm90", "", (), memory_bytes=900,
            weight_streaming_budget=wanted, streamable=True,
        )  # fmt: skip
        assert tensorrt_plan.streaming_budget(entry, weights=800, free=free) == kept

    def test_room_is_taken_into_account_when_a_plan_is_loaded(self, root, machine, monkeypatch):
        monkeypatch.setattr(tensorrt_plan.cuda, "memory", lambda: ((256 << 20) + 300, 1 << 40))
        engine = open_engine(compile_bundle(root, [LENGTHS], streamable=True), "net", "tensorrt")
        assert engine._plan._engine.weight_streaming_budget_v2 == 300 == engine.memory_bytes
        assert_right(engine.run(feeds(3)), feeds(3))


class TestMemory:
    def test_what_it_holds(self, engine, machine, root):
        """Weights and buffers; handles are the device's."""
        plan = (root / "engines/net.plan").stat().st_size
        assert engine.memory_bytes == plan
        engine.run(feeds(4))
        assert engine.memory_bytes - plan == machine.used - machine.reserved
        uploaded = engine.upload({"x": feeds(16)["x"]})
        engine.run(feeds(4))
        assert engine.memory_bytes - plan == machine.used - machine.reserved - feeds(16)["x"].nbytes
        del uploaded

    def test_closing_frees_everything_but_handles(self, bundle, machine):
        engine = open_engine(bundle, "net", "tensorrt")
        uploaded = engine.upload({"x": feeds(4)["x"]})
        for tokens in (4, 4, 4, 9, 9):
            engine.run({**feeds(tokens), **(uploaded if tokens == 4 else {})})
        engine.close()
        assert (machine.used, machine.executables) == (feeds(4)["x"].nbytes, {})
        np.testing.assert_array_equal(engine.download(uploaded["x"]), feeds(4)["x"])
        del uploaded
        assert (machine.used, machine.leaks) == (0, [])
        assert all(stream.closed for stream in machine.streams.values())
        assert engine.memory_bytes == 0
        engine.close()
        for call in (lambda: engine.run(feeds(2)), lambda: engine.upload({"x": feeds(2)["x"]})):
            with pytest.raises(BackendError, match="the engine of net is closed; open it again"):
                call()

    def test_an_engine_that_is_dropped_is_closed(self, bundle, machine):
        open_engine(bundle, "net", "tensorrt").run(feeds(4))
        gc.collect()
        assert (machine.used, machine.leaks) == (0, [])

    def test_too_little_for_the_weights(self, bundle, machine):
        machine.memory = 900
        with pytest.raises(OutOfMemoryError) as caught:
            open_engine(bundle, "net", "tensorrt")
        path = bundle.root / "engines/net.plan"
        assert str(caught.value).startswith(f"TensorRT cannot load {path}: the GPU is out of memory; ask for a smaller")

    def test_too_little_for_a_shape(self, bundle, machine):
        """It can run on, with another shape or once there is memory."""
        machine.memory = 2500
        engine = open_engine(bundle, "net", "tensorrt")
        for seed in range(3):
            assert_right(engine.run(feeds(2, seed)), feeds(2, seed))
        for _ in range(2):
            with pytest.raises(OutOfMemoryError, match=r"the GPU is out of memory: .* more are needed"):
                engine.run(feeds(16))
            assert_right(engine.run(feeds(2)), feeds(2))
        machine.memory = 1 << 20
        for seed in range(3):
            assert_right(engine.run(feeds(16, seed)), feeds(16, seed))

    def test_too_little_for_an_upload(self, bundle, machine):
        machine.memory = 1100
        engine = open_engine(bundle, "net", "tensorrt")
        with pytest.raises(OutOfMemoryError):
            engine.upload(feeds(16))
        gc.collect()
        engine.upload({"scale": feeds(1)["scale"]})
        engine.close()
        assert machine.used == 0

    def test_another_engine_is_closed_to_make_room(self, bundle, machine):
        machine.memory = 1900
        first = open_engine(bundle, "net", "tensorrt")
        with pytest.raises(OutOfMemoryError):
            open_engine(bundle, "net", "tensorrt")
        first.close()
        gc.collect()
        assert machine.used == 0
        open_engine(bundle, "net", "tensorrt").run(feeds(1))

    @pytest.mark.parametrize("step", ["cudaStreamCreateWithFlags", "create_execution_context"])
    def test_what_fails_to_open_holds_nothing(self, bundle, machine, step):
        (machine.reject.add if step.startswith("create") else machine.fail.setdefault)(
            *([step] if step.startswith("create") else [step, 999])
        )
        with pytest.raises(BackendError):
            open_engine(bundle, "net", "tensorrt")
        gc.collect()
        assert (machine.used, machine.leaks) == (0, [])


class TestFailures:
    @pytest.mark.parametrize(
        ("method", "message"),
        [
            ("set_optimization_profile_async", r"cannot take inputs of x \(3, 4\), scale \(1,\)"),
            ("set_input_shape", r"cannot take inputs of x \(3, 4\)"),
            ("set_tensor_address", "cannot take x from its buffer"),
            ("execute_async_v3", "cannot run net"),
        ],
    )
    def test_tensorrt_refuses(self, engine, machine, method, message):
        machine.reject.add(method)
        for _ in range(2):
            with pytest.raises(
                BackendError, match=rf"TensorRT {message}.*: \[{method}\] it was told to refuse; compile"
            ):
                engine.run(feeds(3))
        machine.reject.clear()
        for seed in range(3):
            assert_right(engine.run(feeds(3, seed)), feeds(3, seed))

    def test_it_does_not_start(self, bundle, machine):
        machine.reject.add("Runtime")
        with pytest.raises(
            BackendError, match="TensorRT cannot start: CUDA initialization failure with error: 801; comp"
        ):
            open_engine(bundle, "net", "tensorrt")

    def test_shapes_it_cannot_tell(self, engine, machine):
        machine.reject.add("get_tensor_shape")
        with pytest.raises(BackendError, match="TensorRT cannot tell the shape of y: it gives no reason"):
            engine.run(feeds(3))

    def test_on_the_device(self, engine, machine):
        machine.fail["cudaStreamSynchronize"] = 700
        with pytest.raises(BackendError, match="cudaStreamSynchronize failed: cudaErrorIllegalAddress"):
            engine.run(feeds(3))
        engine.close()  # Says nothing more.

    def test_out_of_memory_while_it_runs(self, engine, machine, monkeypatch):
        machine.reject.add("execute_async_v3")
        monkeypatch.setattr(fake_tensorrt.Engine.refuse, "__defaults__", ("Cuda Runtime (out of memory)",))
        with pytest.raises(
            OutOfMemoryError, match="TensorRT cannot run net: the GPU is out of memory; ask for a small"
        ):
            engine.run(feeds(3))


class TestTheImitation:
    """It notices what a GPU would answer with a wrong picture or a crash."""

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda c: c.shapes.pop("x"), "the shape of x is not set"),
            (lambda c: c.addresses.pop("x"), "no address for {'x'}"),
            (lambda c: c.set_tensor_address("x", 4096), "no memory of the device"),
            (lambda c: c.set_input_shape("x", (17, 4)), "out of profile"),
            (lambda c: c.set_input_shape("x", (3, 4)), "tokens is"),
            (lambda c: setattr(c, "scratch", (c.scratch[0], 1)), "scratch memory is too small"),
        ],
    )
    def test_contexts(self, engine, spoil, message):
        engine.run(feeds(4))
        context = engine._context._context
        with pytest.raises(Misuse, match=message):
            spoil(context)
            context.execute_async_v3(engine._stream.handle)

    def test_a_graph_whose_context_was_changed(self, engine):
        for _ in range(2):
            engine.run(feeds(4))
        (recorded,) = engine._runs.values()
        recorded.context._context.set_input_shape("x", (3, 4))
        with pytest.raises(Misuse, match="changed before its work was done, or since it was captured"):
            engine.run(feeds(4))

    def test_a_capture_without_a_run_before_it(self, engine, machine):
        engine.run(feeds(4))
        context = engine._context
        context._context.set_input_shape("x", (4, 4))
        with pytest.raises(Misuse, match="has not run since it was changed"):
            engine._stream.capture(lambda: context.enqueue(engine._stream))


RANGES = {
    "tokens": (1, 64, 600),
    "caption_tokens": (1, 64, 600),
    "text_tokens": (1, 64, 600),
    "image_tokens": (1, 64, 256),
    "all_tokens": (1, 128, 900),
    "batch": (1, 1, 2),
    "height": (2, 8, 16),
    "width": (2, 8, 16),
}


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_pictures_are_those_of_onnx_runtime(family, bundle_of, machine, tmp_path):
    """A whole pipeline, with guidance, twice, at two sizes."""
    root = tmp_path / "bundle"
    shutil.copytree(bundle_of(family), root)
    compile_bundle(root, [RANGES])
    with Pipeline.open(root, backend="tensorrt") as pipeline, Pipeline.open(root) as plain:
        for height, width, prompt in [
            (64, 48, "a red circle"),
            (32, 64, "a blue square and more of it"),
            (64, 48, "a"),
        ]:
            call = {"negative_prompt": "blurry", "num_inference_steps": 5, "guidance_scale": 3.0, "seed": 1}
            call |= {"height": height, "width": width, "output_type": "np"}
            found, expected = pipeline(prompt, **call).images, plain(prompt, **call).images
            np.testing.assert_array_equal(found, expected)
        assert machine.count("cudaGraphLaunch") >= 12
    gc.collect()
    assert (machine.used, machine.leaks) == (0, [])


def test_the_calls_exist_in_the_real_tensorrt():
    """Every attribute of TensorRT that the backend uses, and what the functions among them take."""
    try:
        trt = tensorrt_api.load()
    except BackendError as error:
        pytest.skip(str(error))
    uses = {
        trt: "Runtime Refitter OnnxParserRefitter Weights ILogger __version__",
        trt.Runtime: "deserialize_cuda_engine",
        trt.ExecutionContextAllocationStrategy: "USER_MANAGED",
        trt.TensorIOMode: "INPUT",
        trt.TensorLocation: "DEVICE",
        trt.DataType: " ".join([*tensorrt_plan.DTYPES.values(), *tensorrt_plan.WEIGHTS.values()]),
        trt.ICudaEngine: "create_runtime_config create_execution_context weight_streaming_budget_v2 get_tensor_mode "
        "streamable_weights_size get_tensor_dtype get_tensor_name num_io_tensors get_tensor_location "
        "num_optimization_profiles",
        trt.IRuntimeConfig: "set_execution_context_allocation_strategy",
        trt.IExecutionContext: "set_optimization_profile_async set_input_shape update_device_memory_size_for_shapes "
        "get_tensor_shape set_tensor_address set_device_memory execute_async_v3",
        trt.Refitter: "get_all_weights get_missing_weights set_named_weights refit_cuda_engine",
        trt.OnnxParserRefitter: "load_model_proto load_initializer refit_model_proto",
    }
    for owner, names in uses.items():
        for name in names.split():
            assert hasattr(owner, name), f"{owner}.{name}"
    context = trt.IExecutionContext
    signatures = [
        (trt.Runtime, "deserialize_cuda_engine", "serialized_engine: typing_extensions.Buffer) ->"),
        (trt.ICudaEngine, "create_execution_context", "runtime_config: tensorrt_bindings.tensorrt.IRuntimeConfig"),
        (trt.IRuntimeConfig, "set_execution_context_allocation_strategy", "strategy: "),
        (context, "set_optimization_profile_async", "profile_index: typing.SupportsInt, stream_handle: "),
        (context, "set_input_shape", "name: str, shape: tuple) -> bool"),
        (context, "update_device_memory_size_for_shapes", "IExecutionContext) -> int"),
        (context, "get_tensor_shape", "name: str) -> tensorrt_bindings.tensorrt.Dims"),
        (context, "set_tensor_address", "name: str, memory: typing.SupportsInt) -> bool"),
        (context, "set_device_memory", "memory: typing.SupportsInt, size: typing.SupportsInt) -> None"),
        (context, "execute_async_v3", "stream_handle: typing.SupportsInt) -> bool"),
        (trt.Refitter, "__init__", "engine: tensorrt_bindings.tensorrt.ICudaEngine, logger: "),
        (trt.Refitter, "get_all_weights", "-> list[str]"),
        (trt.Refitter, "get_missing_weights", "-> list[str]"),
        (trt.Refitter, "set_named_weights", "name: str, weights: tensorrt_bindings.tensorrt.Weights) -> bool"),
        (trt.Weights, "__init__", "type: tensorrt_bindings.tensorrt.DataType, ptr: typing.SupportsInt, count: "),
        (trt.Refitter, "refit_cuda_engine", "Refitter) -> bool"),
        (trt.OnnxParserRefitter, "__init__", "refitter: tensorrt_bindings.tensorrt.Refitter, logger: "),
        (trt.OnnxParserRefitter, "load_model_proto", "model: typing_extensions.Buffer, path: str = None) -> bool"),
        (trt.OnnxParserRefitter, "load_initializer", "data: typing.SupportsInt, size: typing.SupportsInt) -> bool"),
        (trt.OnnxParserRefitter, "refit_model_proto", "OnnxParserRefitter) -> bool"),
    ]
    for owner, name, signature in signatures:
        assert signature in getattr(owner, name).__doc__, getattr(owner, name).__doc__
    # Nothing is called that is not in the list above.
    text = Path(tensorrt.__file__).read_text() + Path(tensorrt_plan.__file__).read_text()
    objects = r"(?:self\._(?:context|engine|runtime|trt)|(?<!zimg\.)\b(?:engine|refitter|parser|config|trt))"
    called = set(re.findall(objects + r"\.(\w+)", text))
    known = {name for names in uses.values() for name in names.split()} | {owner.__name__ for owner in uses}
    of_rtx = {"dynamic_shapes_kernel_specialization_strategy", "DynamicShapesKernelSpecializationStrategy"}
    assert len(called) > 20
    assert called - known == of_rtx
