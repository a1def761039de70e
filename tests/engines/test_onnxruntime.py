"""ONNX Runtime on hand-made bundles whose graphs point into safetensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from tests import handmade
from zimg.engines import safetensors
from zimg.engines.base import open_engine
from zimg.engines.bundle import Bundle, Component, TensorSpec
from zimg.engines.errors import BackendError, BundleError, UsageError

OFFLINE = ["AzureExecutionProvider", "CPUExecutionProvider"]
GENERATOR = np.random.default_rng(0)
WEIGHT, BIAS = GENERATOR.standard_normal((4, 6)).astype(np.float32), GENERATOR.standard_normal(6).astype(np.float32)
INPUTS = {"x": TensorSpec("float32", ("tokens", 4)), "scale": TensorSpec("float32", (1,))}
OUTPUTS = {"y": TensorSpec("float32", ("tokens", 6)), "norm": TensorSpec("float32", ("tokens", 1))}


def external(info: safetensors.TensorInfo, **changes: Any) -> TensorProto:
    """An initializer without bytes, which lie in a safetensors file; ``changes`` say something else of where."""
    tensor = TensorProto(name=info.name, data_type=TensorProto.FLOAT, dims=info.shape)
    tensor.data_location = TensorProto.EXTERNAL
    place = {"location": info.file.name, "offset": info.offset, "length": info.nbytes} | changes
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model(
    initializers: list[TensorProto], nodes: list[NodeProto], inputs: Any = INPUTS, outputs: Any = OUTPUTS
) -> bytes:
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    values = [
        [helper.make_tensor_value_info(name, kinds[spec.dtype], spec.shape) for name, spec in specs.items()]
        for specs in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "net", *values, initializer=initializers)
    made: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return made.SerializeToString()


def write(root: Path, graphs: dict[str, bytes] | None = None, **changes: Any) -> Bundle:
    """A bundle of y = scale * (x weight + bias) and the norm of its rows; ``changes`` as of :func:`external`."""
    root.mkdir(parents=True, exist_ok=True)
    infos = safetensors.write(
        root / "net.safetensors",
        {"weight": ("float32", WEIGHT.shape), "bias": ("float32", BIAS.shape)},
        {"weight": [WEIGHT], "bias": [BIAS]},
    )
    nodes = [
        helper.make_node("Gemm", ["x", "weight", "bias"], ["sum"]),
        helper.make_node("Mul", ["sum", "scale"], ["y"]),
        helper.make_node("ReduceL2", ["y", "axes"], ["norm"], keepdims=1),
    ]
    small = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    whole = model([external(infos["weight"], **changes), external(infos["bias"]), small], nodes)
    graphs = graphs or {"float32": whole}
    files = {f"net.{compute}.onnx": graph for compute, graph in graphs.items()}
    names = {compute: f"net.{compute}.onnx" for compute in graphs}
    component = Component(("net.safetensors",), names, INPUTS, OUTPUTS)
    weights = {"net.safetensors": (root / "net.safetensors").read_bytes()}
    return Bundle.open(handmade.write_bundle(root, weights | files, components={"net": component}))


@pytest.fixture(autouse=True)
def only_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: OFFLINE)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write(tmp_path / "bundle")


def feeds(tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).standard_normal((tokens, 4)).astype(np.float32)
    return {"x": x, "scale": np.array([1.5], np.float32)}


def assert_right(found: dict[str, np.ndarray], given: dict[str, np.ndarray]) -> None:
    y = given["scale"] * (given["x"] @ WEIGHT + BIAS)
    assert list(found) == ["y", "norm"]
    assert all(value.dtype == np.float32 for value in found.values())
    np.testing.assert_allclose(found["y"], y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["norm"], np.linalg.norm(y, axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_runs(bundle, device, tokens):
    engine = open_engine(bundle, "net", device=device)
    assert (engine.inputs, engine.outputs) == (INPUTS, OUTPUTS)
    for seed in range(2):
        given = feeds(tokens, seed)
        assert_right(engine.run(given), given)


def test_what_was_uploaded_serves_many_runs(bundle):
    engine = open_engine(bundle, "net")
    given = feeds(3)
    constant = engine.upload({"scale": given["scale"]})
    for seed in range(3):
        x = feeds(5, seed)["x"]
        assert_right(engine.run({"x": x, **constant}), {"x": x, "scale": given["scale"]})


def test_inputs_that_lie_strided_in_memory(bundle):
    given = feeds(1) | {"x": np.asfortranarray(feeds(10)["x"])[::2]}
    assert not given["x"].flags.c_contiguous
    assert_right(open_engine(bundle, "net").run(given), given)


def test_from_another_folder(bundle, tmp_path, monkeypatch):
    """Weights are found beside the graph, wherever the process is."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_right(open_engine(bundle, "net").run(feeds(2)), feeds(2))


def test_weights_may_be_a_hard_link(bundle, tmp_path):
    weights = bundle.file("net.safetensors")
    weights.rename(tmp_path / "checkpoint.safetensors")
    weights.hardlink_to(tmp_path / "checkpoint.safetensors")
    assert_right(open_engine(bundle, "net").run(feeds(2)), feeds(2))


def test_a_closed_engine_does_not_run(bundle):
    engine = open_engine(bundle, "net")
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match="the engine of net is closed; open it again"):
        engine.run(feeds(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((2, 5), np.float32)}, r"net takes 'x' in the shape \('tokens', 4\), not \(2, 5\)"),
        ({"x": np.zeros((2, 4))}, "net takes 'x' in float32, not float64"),
        ({"z": np.zeros(1)}, "net has no input 'z'; it has x, scale"),
        ({"x": object()}, "ONNX Runtime failed in net: "),
    ],
)
def test_inputs_that_do_not_fit(bundle, changes, message):
    with pytest.raises(BackendError, match=message):
        open_engine(bundle, "net").run(feeds(2) | changes)


def test_a_missing_input(bundle):
    with pytest.raises(BackendError, match="net needs the input 'scale'"):
        open_engine(bundle, "net").run({"x": feeds(2)["x"]})


def constant_graph(value: float, dtype: int = TensorProto.FLOAT) -> bytes:
    """A graph that says which one ran: y is ``value`` everywhere, computed in ``dtype``."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["zero"]),
        helper.make_node("Cast", ["zero"], ["inside"], to=dtype),
        helper.make_node("Add", ["inside", "value"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["y", "axes"], ["norm"], keepdims=1),
    ]
    initializers = [
        helper.make_tensor("w", TensorProto.FLOAT, [4, 6], np.zeros(24)),
        helper.make_tensor("value", dtype, [1], [value]),
        helper.make_tensor("axes", TensorProto.INT64, [1], [1]),
    ]
    return model(initializers, nodes)


class TestGraphs:
    """On the CPU the graph that computes in float32 runs, whatever else there is."""

    @pytest.mark.parametrize("order", [["bfloat16", "float32"], ["float32", "bfloat16"]])
    def test_float32_is_preferred(self, tmp_path, order):
        made = {"bfloat16": constant_graph(1, TensorProto.BFLOAT16), "float32": constant_graph(2)}
        bundle = write(tmp_path / "bundle", {compute: made[compute] for compute in order})
        assert list(bundle.component("net").graphs) == order
        assert (open_engine(bundle, "net").run(feeds(2))["y"] == 2).all()

    def test_the_only_graph_runs(self, tmp_path):
        bundle = write(tmp_path / "bundle", {"float16": constant_graph(3, TensorProto.FLOAT16)})
        assert (open_engine(bundle, "net").run(feeds(2))["y"] == 3).all()

    def test_a_graph_with_no_kernels_for_it(self, tmp_path):
        product = [
            helper.make_node("Cast", ["x"], ["half"], to=TensorProto.BFLOAT16),
            helper.make_node("MatMul", ["half", "w"], ["product"]),
            helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMax", ["y"], ["norm"]),
        ]
        weight = helper.make_tensor("w", TensorProto.BFLOAT16, [4, 6], np.zeros(24))
        bundle = write(tmp_path / "bundle", {"bfloat16": model([weight], product)})
        with pytest.raises(BackendError, match=r"ONNX Runtime cannot load .*onnx: .*; try --backend torch"):
            open_engine(bundle, "net")


class TestDevices:
    @pytest.mark.parametrize("device", ["toaster", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "cuda 1"])
    def test_unknown(self, bundle, device):
        with pytest.raises(UsageError) as caught:
            open_engine(bundle, "net", device=device)
        assert str(caught.value) == f"ONNX Runtime has no device {device!r}; choose cpu, cuda or cuda:N"

    @pytest.mark.parametrize("device", ["cuda", "cuda:1"])
    def test_without_cuda(self, bundle, device):
        with pytest.raises(BackendError) as caught:
            open_engine(bundle, "net", device=device)
        expected = "this onnxruntime has no CUDA provider; pip install onnxruntime-gpu, or use --device cpu"
        assert str(caught.value) == expected

    @pytest.mark.parametrize("device", [None, "cuda"])
    def test_cuda_that_does_not_start(self, bundle, device, monkeypatch):
        """ONNX Runtime goes on with the CPU then, and says so in a warning at most."""
        if "CUDAExecutionProvider" in onnxruntime.capi._pybind_state.get_available_providers():
            pytest.skip("here it starts")
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", *OFFLINE])
        with pytest.raises(BackendError, match="could not start CUDA; check the driver, CUDA 12 and cuDNN 9"):
            open_engine(bundle, "net", device=device)

    def test_not_installed(self, bundle, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(BackendError, match=r"onnxruntime is not installed; pip install onnxruntime"):
            open_engine(bundle, "net")

    def test_binding_of_inputs_that_are_on_the_device(self, bundle, monkeypatch):
        """The way of CUDA, walked on the CPU: what was uploaded is bound again, the rest is copied for each run."""
        engine = open_engine(bundle, "net")
        copy, copied = onnxruntime.OrtValue.ortvalue_from_numpy, []

        def to_device(value: np.ndarray, kind: str, index: int) -> Any:
            copied.append((value.shape, kind, index))
            return copy(value)

        monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", to_device)
        monkeypatch.setattr(engine, "_device", ("cuda", 1))
        constant = engine.upload({"scale": np.array([1.5], np.float32)})
        for tokens in (2, 5):
            given = feeds(tokens) | {"x": np.asfortranarray(feeds(tokens)["x"])}
            assert_right(engine.run({"x": given["x"], **constant}), given)
        assert copied == [((1,), "cuda", 1), ((2, 4), "cuda", 1), ((5, 4), "cuda", 1)]


class TestBrokenBundles:
    @pytest.mark.parametrize("content", [b"", b"garbage" * 20, b"\x0a\x7f half a graph"])
    def test_graph(self, tmp_path, content):
        bundle = write(tmp_path / "bundle", {"float32": content})
        with pytest.raises(BundleError, match=r"cannot load .*net\.float32\.onnx: .*; copy or build the bundle again"):
            open_engine(bundle, "net")

    @pytest.mark.parametrize("keep", [0.3, 0.9])
    def test_graph_cut_short(self, bundle, keep):
        path = bundle.file("net.float32.onnx")
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
        with pytest.raises(BundleError, match="copy or build the bundle again"):
            open_engine(bundle, "net")

    @pytest.mark.parametrize(
        "place",
        [
            {"offset": 10**6}, {"offset": -8}, {"offset": 2**62}, {"length": 92}, {"length": 10**9},
            {"location": "missing.safetensors"}, {"location": "../secret"}, {"location": "{absolute}"},
        ],
        ids=str,
    )  # fmt: skip
    def test_weights_outside_the_file_or_the_bundle(self, tmp_path, place):
        (tmp_path / "secret").write_bytes(bytes(1000))
        if place.get("location") == "{absolute}":
            place = {"location": tmp_path / "secret"}
        bundle = write(tmp_path / "bundle", **place)
        with pytest.raises(BundleError, match=r"cannot load .*; copy or build the bundle again") as caught:
            open_engine(bundle, "net")
        assert "\n" not in str(caught.value)

    def test_weights_cut_short(self, bundle):
        path = bundle.file("net.safetensors")
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(BundleError, match="copy or build the bundle again"):
            open_engine(bundle, "net")

    def test_no_graph(self, tmp_path):
        components = {"table": Component(("net.safetensors",))}
        bundle = Bundle.open(handmade.write_bundle(tmp_path, {"net.safetensors": b""}, components=components))
        with pytest.raises(BackendError, match="table is a table of tensors and has no graph to run"):
            open_engine(bundle, "table")

    def test_outputs_that_the_manifest_invents(self, tmp_path):
        bundle = write(tmp_path / "bundle")
        bundle.component("net").outputs["invented"] = TensorSpec("float32", ())
        with pytest.raises(BackendError, match=r"ONNX Runtime failed in net: .*invented"):
            open_engine(bundle, "net").run(feeds(2))


class TestOutOfMemory:
    EXPECTED = "out of memory; ask for a smaller picture, or use a bundle of lower precision"

    @pytest.fixture
    def growing(self, tmp_path: Path) -> Any:
        """An engine whose output is as large as it is told."""
        inputs = {"x": TensorSpec("float32", (1,)), "shape": TensorSpec("int64", ("n",))}
        outputs = {"y": TensorSpec("float32", ("m",))}
        graph = model([], [helper.make_node("Expand", ["x", "shape"], ["y"])], inputs, outputs)
        component = Component((), {"float32": "net.onnx"}, inputs, outputs)
        root = handmade.write_bundle(tmp_path, {"net.onnx": graph}, components={"net": component})
        return open_engine(Bundle.open(root), "net")

    def test_more_than_there_is(self, growing, capfd):
        """The error is one line: ONNX Runtime's own log stays off the terminal."""
        x = np.ones(1, np.float32)
        with pytest.raises(BackendError) as caught:
            growing.run({"x": x, "shape": np.array([10**13], np.int64)})
        assert str(caught.value) == f"ONNX Runtime failed in net: {self.EXPECTED}"
        assert capfd.readouterr() == ("", "")

    def test_another_failure_is_one_line_too(self, growing, capfd):
        with pytest.raises(BackendError, match="try --backend torch, and report this") as caught:
            growing.run({"x": np.ones(1, np.float32), "shape": np.array([-5], np.int64)})
        assert "\n" not in str(caught.value)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            RuntimeError("std::bad_alloc"),
            RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);"),
            RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 1024"),
            RuntimeError("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED"),
        ],
    )
    def test_in_the_words_of_each_library(self, bundle, error, monkeypatch):
        class Session:
            def run(self, names: Any, feeds: Any) -> Any:
                raise error

        engine = open_engine(bundle, "net")
        monkeypatch.setattr(engine, "_session", Session())
        with pytest.raises(BackendError) as caught:
            engine.run(feeds(2))
        assert str(caught.value) == f"ONNX Runtime failed in net: {self.EXPECTED}"

    def test_while_loading(self, bundle, monkeypatch):
        def fail(*arguments: Any, **options: Any) -> Any:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 40000000000")

        monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
        with pytest.raises(BackendError, match=f"cannot load .*: {self.EXPECTED}"):
            open_engine(bundle, "net")

    def test_ctrl_c_is_not_an_error_of_the_backend(self, bundle, monkeypatch):
        class Session:
            def run(self, names: Any, feeds: Any) -> Any:
                raise KeyboardInterrupt

        engine = open_engine(bundle, "net")
        monkeypatch.setattr(engine, "_session", Session())
        with pytest.raises(KeyboardInterrupt):
            engine.run(feeds(2))
