"""What every backend must do alike, on each of them, against numpy.

A GPU's backends run over imitations: sessions of ONNX Runtime on the CPU in the place of its CUDA provider and of the
TensorRT for RTX plugin, and an imitation of TensorRT and CUDA that notices misuse.
"""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from tests import fake_tensorrt, handmade
from tests.fake_onnxruntime import OFFLINE, FakeCuda, FakePlugin, resident
from zimgkit.engines.base import BACKENDS, Handle, open_engine
from zimgkit.engines.bundle import Bundle, Component, TensorSpec
from zimgkit.engines.cpu import multiplies_bfloat16
from zimgkit.engines.errors import BackendError, OutOfMemoryError
from zimgkit.engines.openvino import engine as openvino
from zimgkit.engines.torch import blocks, layers

Array = NDArray[Any]

WEIGHT = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
HUGE = 10**7
"""Squared, more numbers than any machine has addresses for."""

FIRST = Component(
    (),
    inputs={
        "x": TensorSpec("float32", ("tokens", 4)),
        "scale": TensorSpec("bfloat16", (1,)),
        "rows": TensorSpec("int64", ("tokens",)),
        "mask": TensorSpec("bool", ("tokens", 1)),
    },
    outputs={
        "y": TensorSpec("float32", ("tokens", 6)),
        "half": TensorSpec("bfloat16", ("tokens", 6)),
        "twice": TensorSpec("float32", ("2*tokens", 6)),
        "echo": TensorSpec("float32", ("tokens", 4)),
        "constant": TensorSpec("float32", (4, 6)),
    },
)
"""y = mask * scale * (x weight)[rows]; y in bfloat16; y twice over; an input and a weight as they are."""
SECOND = Component(
    (),
    inputs={"half": TensorSpec("bfloat16", ("tokens", 6)), "y": TensorSpec("float32", ("tokens", 6))},
    outputs={"rest": TensorSpec("float32", ("tokens", 6)), "sum": TensorSpec("bfloat16", ("tokens", 6))},
)
"""What rounding has taken away, y - half; and their sum."""
PRODUCTS = Component(
    (),
    inputs={"a": TensorSpec("float32", ("n", 1)), "b": TensorSpec("float32", (1, "m"))},
    outputs={"c": TensorSpec("float32", ("n", "m"))},
)
"""Every product of two numbers: small inputs, and an output as large as it is told."""


def graph(component: Component, nodes: list[NodeProto], compute: str) -> bytes:
    """A graph whose inputs and outputs in bfloat16 are that, or float32, and which computes in float32 inside."""
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
    kinds["bfloat16"] = TensorProto.BFLOAT16 if compute == "bfloat16" else TensorProto.FLOAT
    values = [
        [helper.make_tensor_value_info(name, kinds[spec.dtype], spec.shape) for name, spec in specs.items()]
        for specs in (component.inputs, component.outputs)
    ]
    weight = helper.make_tensor("weight", TensorProto.FLOAT, WEIGHT.shape, WEIGHT.ravel())
    made = helper.make_graph(nodes, "net", *values, initializer=[weight])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=11).SerializeToString()


def nodes_of(name: str, compute: str) -> list[NodeProto]:
    half = TensorProto.BFLOAT16 if compute == "bfloat16" else TensorProto.FLOAT
    node = helper.make_node
    return {
        "first": [
            node("MatMul", ["x", "weight"], ["product"]),
            node("Gather", ["product", "rows"], ["taken"]),
            node("Cast", ["scale"], ["wide"], to=TensorProto.FLOAT),
            node("Mul", ["taken", "wide"], ["scaled"]),
            node("Cast", ["mask"], ["factor"], to=TensorProto.FLOAT),
            node("Mul", ["scaled", "factor"], ["y"]),
            node("Cast", ["y"], ["half"], to=half),
            node("Concat", ["y", "y"], ["twice"], axis=0),
            node("Identity", ["x"], ["echo"]),
            node("Identity", ["weight"], ["constant"]),
        ],
        "second": [
            node("Cast", ["half"], ["wide"], to=TensorProto.FLOAT),
            node("Sub", ["y", "wide"], ["rest"]),
            node("Add", ["y", "wide"], ["total"]),
            node("Cast", ["total"], ["sum"], to=half),
        ],
        "products": [node("Mul", ["a", "b"], ["c"])],
    }[name]


def write(root: Path, *computes: str) -> Bundle:
    """The bundle of these components, with graphs that compute in these element types, the bundle's own first."""
    files, components = {}, {}
    for name, component in {"first": FIRST, "second": SECOND, "products": PRODUCTS}.items():
        graphs = {compute: f"{name}.{compute}.onnx" for compute in computes}
        files |= {file: graph(component, nodes_of(name, compute), compute) for compute, file in graphs.items()}
        components[name] = Component((), graphs, component.inputs, component.outputs)
    return Bundle.open(handmade.write_bundle(root, files, components=components, precision=computes[0]))


@dataclasses.dataclass
class Setup:
    """A backend on a machine of a kind, and a bundle for it."""

    bundle: Bundle
    backend: str
    device: str
    """As an engine calls it."""
    rounds: bool
    """Whether what the manifest has in bfloat16 is so on this device."""
    memory: Callable[[], int]
    """How many bytes are in use."""
    rtol: float = 1e-5
    """Of float32 arithmetic, which OpenVINO has in bfloat16 where it runs a bundle's own graph."""

    def open(self, component: str = "first") -> Any:
        return open_engine(self.bundle, component, self.backend, self.device.partition(":")[0])


CASES = [
    "onnxruntime",
    "onnxruntime bfloat16",
    "onnxruntime cuda",
    "openvino",
    "openvino bfloat16",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
    "torch bfloat16",
    "torch-compiled",
]


@pytest.fixture(params=CASES)
def setup(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    backend, _, kind = request.param.partition(" ")
    on_gpu = kind == "cuda" or backend.startswith("tensorrt")
    # A GPU runs the bundle's own graph. The CPU prefers one in float32, and takes the other where that is all there is.
    computes = ["bfloat16"] if on_gpu or kind == "bfloat16" else ["bfloat16", "float32"]
    bundle, memory = write(tmp_path / "bundle", *computes), resident
    if kind == "cuda":
        FakeCuda(monkeypatch)
    elif backend == "onnxruntime":
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: OFFLINE)
    elif backend == "tensorrt-rtx":
        FakePlugin(monkeypatch)
    elif backend == "tensorrt":
        machine = fake_tensorrt.install(monkeypatch)
        ranges = {"tokens": (1, 4, 1 << 20), "n": (1, 1, HUGE), "m": (1, 1, HUGE)}
        bundle = fake_tensorrt.compile_bundle(bundle.root, [ranges])
        memory = lambda: machine.used  # noqa: E731
    elif backend.startswith("torch"):
        monkeypatch.setattr(layers, "PRODUCTS_IN_BFLOAT16", kind == "bfloat16")
        # What is compiled has tests of its own, and takes seconds.
        monkeypatch.setattr(blocks, "compile_block", lambda module: module)
    elif backend == "openvino":
        if kind == "bfloat16" and not multiplies_bfloat16():
            pytest.skip("OpenVINO rounds to bfloat16 where the CPU multiplies it, and cuts bits off elsewhere")
        monkeypatch.setattr(openvino, "multiplies_bfloat16", lambda core, place: kind == "bfloat16")
    rtol = 2**-4 if (backend, kind) == ("openvino", "bfloat16") else 1e-5
    yield Setup(bundle, backend, "cuda:0" if on_gpu else "cpu", len(computes) == 1, memory, rtol)
    if backend == "tensorrt":
        gc.collect()  # Engines go while the imitation is there.


def feeds(tokens: int, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        "x": random.standard_normal((tokens, 4)).astype(np.float32),
        "scale": random.integers(1, 9, 1).astype(np.float32),  # Which bfloat16 can hold.
        "rows": random.integers(0, tokens, tokens),
        "mask": random.integers(0, 2, (tokens, 1)).astype(bool),
    }


def rounded(values: Array) -> Array:
    """To bfloat16 and back."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def assert_right(setup: Setup, found: dict[str, Any], given: dict[str, Array]) -> None:
    """The outputs of the first component are what numpy makes of its inputs."""
    assert list(found) == list(FIRST.outputs)
    assert {value.dtype.name for value in found.values()} == {"float32"}
    y = given["mask"] * given["scale"] * (given["x"] @ WEIGHT)[given["rows"]]
    np.testing.assert_allclose(found["y"], y, rtol=setup.rtol, atol=setup.rtol)
    np.testing.assert_array_equal(found["half"], rounded(found["y"]) if setup.rounds else found["y"])
    np.testing.assert_array_equal(found["twice"], np.concatenate([found["y"], found["y"]]))
    np.testing.assert_array_equal(found["echo"], given["x"])
    np.testing.assert_array_equal(found["constant"], WEIGHT)


def downloaded(engine: Any, found: dict[str, Any]) -> dict[str, Array]:
    return {name: engine.download(value) if isinstance(value, Handle) else value for name, value in found.items()}


def test_every_backend_is_among_the_cases():
    assert {case.partition(" ")[0] for case in CASES} == set(BACKENDS)


class TestRuns:
    def test_outputs_are_those_of_numpy(self, setup):
        engine = setup.open()
        assert (engine.inputs, engine.outputs) == (FIRST.inputs, FIRST.outputs)
        assert engine.device == setup.device
        for seed, tokens in enumerate([1, 5, 5, 5, 2, 33, 5]):
            assert_right(setup, engine.run(feeds(tokens, seed)), feeds(tokens, seed))

    def test_several_sets(self, setup):
        engine = setup.open()
        sets = [feeds(tokens, seed) for seed, tokens in enumerate([3, 1, 3])]
        found = engine.run_together([sets[0], engine.upload(sets[1]), sets[2]])
        for results, given in zip(found, sets, strict=True):
            assert_right(setup, results, given)
        assert engine.run_together([]) == []
        with pytest.raises(BackendError, match="first needs the input 'rows'"):
            engine.run_together([sets[0], {name: value for name, value in sets[1].items() if name != "rows"}])

    def test_strided_inputs(self, setup):
        given = feeds(5) | {"x": np.asfortranarray(feeds(10)["x"])[::2], "rows": np.arange(10)[::-2] // 2}
        assert not given["x"].flags.c_contiguous
        engine = setup.open()
        assert_right(setup, engine.run(given), given)
        assert_right(setup, engine.run(engine.upload(given)), given)

    def test_read_only_inputs(self, setup):
        given = feeds(3)
        for value in given.values():
            value.flags.writeable = False
        assert_right(setup, setup.open().run(given), given)

    def test_bfloat16_is_rounded_to_nearest_even(self, setup):
        values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.14159, 1e-40, 3.4e38, -0.0], np.float32)
        given = {"half": np.tile(values[:6], (2, 1)), "y": np.zeros((2, 6), np.float32)}
        given["half"][1, :2] = values[6:]
        engine = setup.open("second")
        expected = -rounded(given["half"]) if setup.rounds else -given["half"]
        for offered in (given, engine.upload(given)):
            np.testing.assert_array_equal(engine.run(offered)["rest"], expected)

    def test_numbers_that_are_none(self, setup):
        half = np.array([[np.nan, np.inf, -np.inf, 0, 1, 2]], np.float32)
        found = setup.open("second").run({"half": half, "y": np.zeros((1, 6), np.float32)})
        np.testing.assert_array_equal(found["sum"], half)


class TestInputsThatDoNotFit:
    @pytest.mark.parametrize("uploaded", [False, True])
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x": np.zeros((2, 5), np.float32)}, r"first takes 'x' in the shape \('tokens', 4\), not \(2, 5\)"),
            ({"x": np.zeros(8, np.float32)}, r"first takes 'x' in the shape \('tokens', 4\), not \(8,\)"),
            ({"x": np.zeros((3, 4), np.float32)}, "first got 'rows' of 2 tokens, and another input of 3"),
            ({"x": np.zeros((2, 4))}, "first takes 'x' in float32, not float64"),
            ({"scale": np.zeros(1, np.int16)}, "first takes 'scale' in b?float(16|32), not int16"),
            ({"rows": np.zeros(2, np.int32)}, "first takes 'rows' in int64, not int32"),
            ({"mask": np.zeros((2, 1), np.uint8)}, "first takes 'mask' in bool, not uint8"),
            ({"other": np.zeros(1, np.float32)}, "first has no input 'other'; it has x, scale, rows, mask"),
        ],
    )
    def test_names_shapes_and_element_types(self, setup, changes, message, uploaded):
        engine = setup.open()
        with pytest.raises(BackendError, match=message):
            engine.run({**feeds(2), **(engine.upload(changes) if uploaded else changes)})
        assert_right(setup, engine.run(feeds(2)), feeds(2))

    def test_a_missing_input(self, setup):
        given = feeds(2)
        del given["rows"]
        with pytest.raises(BackendError, match="first needs the input 'rows'"):
            setup.open().run(given)

    @pytest.mark.parametrize("value", [None, [1.0], 1.5, object()])
    def test_neither_an_array_nor_a_handle(self, setup, value):
        own = f"{setup.backend} on {setup.device}"
        with pytest.raises(BackendError, match=f"first takes 'scale' as a numpy array, or as a handle of {own}, not"):
            setup.open().run(feeds(2) | {"scale": value})

    @pytest.mark.parametrize("values", [np.zeros(1, ">f4"), np.zeros(1, np.complex64), np.array(["a"])])
    def test_element_types_that_no_device_has(self, setup, values):
        engine = setup.open()
        with pytest.raises(BackendError, match=r"first takes no arrays of .*, such as 'x'"):
            engine.upload({"x": values})
        with pytest.raises(BackendError, match="first takes 'x' in "):
            engine.run(feeds(1) | {"x": np.broadcast_to(values, (1, 4))})

    def test_an_output_that_is_none(self, setup):
        with pytest.raises(BackendError, match="first has no output 'x' to keep; it has y, half, twice, echo, const"):
            setup.open().run(feeds(2), keep=["y", "x"])


class TestHandles:
    def test_uploads_serve_many_runs(self, setup):
        engine = setup.open()
        given = feeds(5)
        constants = engine.upload({name: given[name] for name in ("scale", "rows", "mask")})
        assert {name: (h.dtype, h.shape) for name, h in constants.items()} == {
            "scale": ("bfloat16", (1,)), "rows": ("int64", (5,)), "mask": ("bool", (5, 1)),
        }  # fmt: skip
        for seed in range(4):
            x = feeds(5, seed)["x"]
            assert_right(setup, engine.run({"x": x, **constants}), given | {"x": x})

    def test_an_upload_is_not_the_callers_array(self, setup):
        engine, given = setup.open(), feeds(4)
        uploaded, expected = engine.upload(given), feeds(4)
        for value in given.values():
            value[...] = 0
        assert_right(setup, engine.run(uploaded), expected)

    def test_downloads(self, setup):
        engine, given = setup.open(), feeds(3)
        for name, handle in engine.upload(given).items():
            found = engine.download(handle)
            assert (found.dtype, found.shape) == (given[name].dtype, given[name].shape)
            np.testing.assert_array_equal(found, given[name])
            found[...] = 0
            np.testing.assert_array_equal(engine.download(handle), given[name])

    @pytest.mark.parametrize("keep", [["y"], ["half", "echo"], list(FIRST.outputs), {"constant"}])
    def test_kept_outputs(self, setup, keep):
        engine = setup.open()
        for seed, tokens in enumerate([4, 4, 4, 7]):
            found = engine.run(feeds(tokens, seed), keep=keep)
            assert {name for name, value in found.items() if isinstance(value, Handle)} == set(keep)
            for name in keep:
                shape = {"twice": (2 * tokens, 6), "echo": (tokens, 4), "constant": (4, 6)}.get(name, (tokens, 6))
                handle = found[name]
                assert (handle.backend, handle.device) == (setup.backend, setup.device)
                assert (handle.dtype, handle.shape) == (FIRST.outputs[name].dtype, shape)
            assert_right(setup, downloaded(engine, found), feeds(tokens, seed))

    def test_from_one_engine_to_another(self, setup):
        """In bfloat16 too, and after the engine they come from is closed."""
        second = setup.open("second")
        for closed in (False, True):
            first = setup.open()
            for seed in range(4):
                found = first.run(feeds(5, seed), keep=["half", "y"])
                if closed:
                    first.close()
                y = second.download(found["y"])
                half = rounded(y) if setup.rounds else y
                rest = second.run({"half": found["half"], "y": found["y"]})
                np.testing.assert_array_equal(rest["rest"], y - half)
                np.testing.assert_array_equal(rest["sum"], rounded(y + half) if setup.rounds else y + half)
                if closed:
                    np.testing.assert_array_equal(first.download(found["half"]), half)
                    break

    def test_a_handle_is_checked_like_an_array(self, setup):
        first, second = setup.open(), setup.open("second")
        found = first.run(feeds(4), keep=["y", "half", "twice", "echo"])
        with pytest.raises(BackendError, match=r"second takes 'y' in the shape \('tokens', 6\), not \(4, 4\)"):
            second.run({"half": found["half"], "y": found["echo"]})
        with pytest.raises(BackendError, match="second got 'y' of 8 tokens, and another input of 4"):
            second.run({"half": found["half"], "y": found["twice"]})
        with pytest.raises(BackendError, match="second takes 'y' in float32, not bfloat16"):
            second.run({"half": found["half"], "y": found["half"]})

    def test_of_another_backend(self, setup, tmp_path):
        other = open_engine(write(tmp_path / "other", "float32"), "first", "torch", "cpu")
        if setup.backend == "torch":
            other = open_engine(write(tmp_path / "third", "float32"), "first", "onnxruntime", "cpu")
        engine, (name, foreign) = setup.open(), *other.upload({"x": feeds(2)["x"]}).items()
        whose = f"{other.backend} on cpu"
        with pytest.raises(
            BackendError, match=f"first runs with {setup.backend} on {setup.device}, and got 'x' of {whose}"
        ):
            engine.run(feeds(2) | {name: foreign})
        with pytest.raises(BackendError, match=f"and got a handle of {whose}; download it there, and give it as an ar"):
            engine.download(foreign)

    def test_of_another_device(self, setup):
        engine = setup.open()
        foreign = dataclasses.replace(engine.upload({"x": feeds(2)["x"]})["x"], device="cuda:7")
        with pytest.raises(BackendError, match=f"and got 'x' of {setup.backend} on cuda:7; download it there"):
            engine.run(feeds(2) | {"x": foreign})

    def test_their_memory_is_freed_when_they_are_dropped(self, setup):
        """By the last reference, not by the collector of cycles, nor by the next run."""
        engine = setup.open()
        gc.disable()
        try:
            found = engine.run({**feeds(4), **engine.upload({"scale": feeds(4)["scale"]})}, keep=FIRST.outputs)
            values = [weakref.ref(handle.value) for handle in found.values()]
            uploaded = engine.upload(feeds(4))
            engine.run(uploaded)
            values += [weakref.ref(handle.value) for handle in uploaded.values()]
            assert all(value() is not None for value in values)
            del found, uploaded
            assert [value() for value in values] == [None] * 9
        finally:
            gc.enable()

    def test_no_memory_is_lost(self, setup):
        engine, other, tokens = setup.open(), setup.open("second"), 1 << 19
        given = feeds(tokens)
        for step in range(24):
            found = engine.run(engine.upload(given), keep=["y", "half"])
            assert set(other.run({name: found[name] for name in ("half", "y")}, keep=["sum"])) == set(SECOND.outputs)
            if step == 3:
                before = setup.memory()
        # Twenty steps keep 24 MB each and upload 12 MB; libraries' own scratch memory, by core, is no loss.
        assert setup.memory() - before < 20 * 36 * 2**20 / 3


class TestResultsStayWhatTheyWere:
    def test_after_later_runs(self, setup):
        engine = setup.open()
        runs = [(given := feeds(4, seed), engine.run(given, keep=["half", "echo"])) for seed in range(6)]
        for given, found in runs:
            assert_right(setup, downloaded(engine, found), given)

    def test_when_inputs_are_overwritten(self, setup):
        engine, given = setup.open(), feeds(4)
        found = engine.run(given, keep=["echo", "half"])
        before = {name: value.copy() for name, value in given.items()}
        for value in given.values():
            value[...] = 0
        assert_right(setup, downloaded(engine, found), before)

    def test_when_results_are_overwritten(self, setup):
        """An output may be an input or a weight: the caller's is a copy."""
        engine, uploaded = setup.open(), setup.open().upload(feeds(4))
        for _ in range(3):
            found = engine.run(uploaded)
            assert_right(setup, found, feeds(4))
            for value in found.values():
                value[...] = 7


class TestThreads:
    @pytest.mark.parametrize("count", [2, 8])
    @pytest.mark.parametrize("keep", [(), ("y", "half")])
    def test_each_gets_its_own_result(self, setup, count, keep):
        """Of one shape, so that buffers are shared, and of others in between."""
        engine, start = setup.open(), threading.Barrier(count)

        def work(number: int) -> None:
            start.wait()
            for step in range(20):
                given = feeds(4 if step % 5 else 3 + number, 100 * number + step)
                offered = given if step % 2 else {**given, **engine.upload({"scale": given["scale"]})}
                assert_right(setup, downloaded(engine, engine.run(offered, keep)), given)

        with ThreadPoolExecutor(count) as pool:
            for done in [pool.submit(work, number) for number in range(count)]:
                done.result()

    def test_two_engines_of_one_device(self, setup):
        """One makes what the other takes, each in a thread of its own."""
        first, second, found = setup.open(), setup.open("second"), [dict[str, Any]() for _ in range(40)]
        ready = threading.Semaphore(0)

        def produce() -> None:
            for seed, place in enumerate(found):
                place.update(first.run(feeds(5, seed), keep=["half", "y"]))
                ready.release()

        def consume() -> None:
            for place in found:
                assert ready.acquire(timeout=60)
                y = second.download(place["y"])
                rest = second.run({"half": place.pop("half"), "y": place.pop("y")})["rest"]
                np.testing.assert_array_equal(rest, y - (rounded(y) if setup.rounds else y))

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(produce), pool.submit(consume)]:
                done.result()


class TestClosing:
    def test_a_closed_engine_does_nothing(self, setup):
        engine = setup.open()
        engine.run(feeds(2))
        engine.close()
        engine.close()
        for call in (lambda: engine.run(feeds(2)), lambda: engine.upload({"x": feeds(2)["x"]})):
            with pytest.raises(BackendError, match="the engine of first is closed; open it again"):
                call()

    def test_it_waits_for_a_run_under_way(self, setup):
        engine = setup.open()
        engine.run(feeds(4))
        begun, go, run = threading.Event(), threading.Event(), engine._run

        def slow(*given: Any) -> Any:
            begun.set()
            assert go.wait(60)
            return run(*given)

        engine._run = slow
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(engine.run, feeds(4))
            assert begun.wait(60)
            closing = pool.submit(engine.close)
            with pytest.raises(TimeoutError):
                closing.result(timeout=0.1)
            go.set()
            assert_right(setup, running.result(), feeds(4))
            closing.result()
        with pytest.raises(BackendError, match="the engine of first is closed"):
            engine.run(feeds(4))

    def test_while_threads_run(self, setup):
        """Each run is right, or says that the engine is closed."""
        engine, runs = setup.open(), threading.Semaphore(0)

        def work(number: int) -> str:
            for step in range(10**6):
                try:
                    found = engine.run(feeds(4, 100 * number + step))
                except BackendError as error:
                    return str(error)
                assert_right(setup, found, feeds(4, 100 * number + step))
                runs.release()
            return "never closed"

        with ThreadPoolExecutor(3) as pool:
            working = [pool.submit(work, number) for number in range(3)]
            for _ in range(20):
                assert runs.acquire(timeout=60)
            engine.close()
            assert {done.result() for done in working} == {"the engine of first is closed; open it again"}


class TestOutOfMemory:
    def test_a_run(self, setup):
        """It can run on."""
        engine = setup.open("products")
        small = {"a": np.full((2, 1), 2, np.float32), "b": np.full((1, 3), 4, np.float32)}
        for keep in ((), ("c",)):
            np.testing.assert_array_equal(engine.run(small)["c"], np.full((2, 3), 8))
            with pytest.raises(OutOfMemoryError):
                engine.run({"a": np.zeros((HUGE, 1), np.float32), "b": np.zeros((1, HUGE), np.float32)}, keep)
            np.testing.assert_array_equal(engine.run(small)["c"], np.full((2, 3), 8))

    def test_an_upload(self, setup):
        engine = setup.open()
        with pytest.raises(OutOfMemoryError):
            engine.upload({"x": np.broadcast_to(np.float32(1), (HUGE, HUGE))})
        assert_right(setup, engine.run(engine.upload(feeds(3))), feeds(3))
