"""ONNX Runtime on hand-made bundles whose graphs point into safetensors."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from tests import handmade
from tests.fake_onnxruntime import OFFLINE, FakeCann, FakeCuda, resident
from zimgkit.engines.base import Handle, open_engine
from zimgkit.engines.bundle import CPU_GRAPH, Bundle, Component, TensorSpec
from zimgkit.engines.errors import BackendError, BundleError, OutOfMemoryError, UsageError
from zimgkit.engines.onnxruntime import engine as zimg_onnxruntime
from zimgkit.engines.onnxruntime.bound import BoundSession
from zimgkit.engines.onnxruntime.values import Place, download, upload
from zimgkit.engines.tensors import safetensors

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
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
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
    return Bundle.open(handmade.write_bundle(root, weights | files, components={"net": component}), verify=False)


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
        ({"x": object()}, "net takes 'x' as a numpy array, or as a handle of onnxruntime on cpu, not as object"),
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
        assert str(caught.value) == f"ONNX Runtime has no device {device!r}; choose cpu, cuda, cuda:N, cann or cann:N"

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
        with pytest.raises(BackendError, match=r"could not start CUDA \(its provider does not load\); pip install '"):
            open_engine(bundle, "net", device=device)

    def test_cuda_without_its_libraries(self, bundle, tmp_path, monkeypatch):
        """What is missing is named, before a graph is loaded."""
        (tmp_path / "capi").mkdir()
        provider = tmp_path / "capi" / "libonnxruntime_providers_cuda.so"
        provider.write_bytes(bytes(4096))
        monkeypatch.setattr(onnxruntime, "__file__", str(tmp_path / "__init__.py"))
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", *OFFLINE])
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda directory: print("Failed to load"), raising=False)
        bundle.file("net.float32.onnx").write_bytes(b"broken")
        with pytest.raises(BackendError) as caught:
            open_engine(bundle, "net", device="cuda")
        assert str(caught.value).startswith(f"ONNX Runtime could not start CUDA ({provider}: ")
        assert str(caught.value).endswith("and a recent NVIDIA driver, or use --device cpu")

    def test_not_installed(self, bundle, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(BackendError, match=r"onnxruntime is not installed; pip install onnxruntime"):
            open_engine(bundle, "net")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


class TestCann:
    def test_it_runs_there_by_default_and_by_name(self, bundle, monkeypatch):
        cann = FakeCann(monkeypatch)
        assert_right(open_engine(bundle, "net").run(feeds(3)), feeds(3))
        engine = open_engine(bundle, "net", device="cann:2")
        constant = engine.upload({"scale": np.array([1.5], np.float32)})
        assert_right(engine.run({"x": feeds(2)["x"], **constant}), feeds(2))
        assert engine.device == "cann:2"
        assert [options["device_id"] for options in cann.options] == ["0", "2"]
        assert {options["precision_mode"] for options in cann.options} == {"must_keep_origin_dtype"}
        assert set(cann.places) == {("cann", 0), ("cann", 2)}

    def test_without_it(self, bundle, monkeypatch):
        with pytest.raises(BackendError, match="has no CANN provider; pip install onnxruntime-cann, or use"):
            open_engine(bundle, "net", device="cann")
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CANNExecutionProvider", *OFFLINE])
        with pytest.raises(BackendError, match=r"could not start CANN \(its provider does not load\); install CANN"):
            open_engine(bundle, "net", device="cann")


class TestCuda:
    def test_it_is_the_default(self, bundle, cuda):
        assert_right(open_engine(bundle, "net").run(feeds(3)), feeds(3))
        assert cuda.options[0]["device_id"] == "0"
        assert set(cuda.places) == {("cuda", 0)}

    def test_float32_is_not_rounded(self, bundle, cuda):
        open_engine(bundle, "net", device="cuda:3")
        assert cuda.options[0]["device_id"] == "3"
        assert cuda.options[0]["use_tf32"] == "0"

    def test_options_are_those_of_the_provider(self):
        """ONNX Runtime refuses names it does not know, but only where it has the provider."""
        binding = onnxruntime.capi._pybind_state
        if "CUDAExecutionProvider" not in binding.get_available_providers():
            pytest.skip("onnxruntime-gpu is not installed")
        providers = [("CUDAExecutionProvider", zimg_onnxruntime.CUDA_OPTIONS)]
        onnxruntime.InferenceSession(constant_graph(1), providers=providers, enable_fallback=0)

    def test_what_was_uploaded_is_copied_once(self, bundle, cuda):
        engine = open_engine(bundle, "net", device="cuda:1")
        constant = engine.upload({"scale": np.array([1.5], np.float32)})
        for tokens in (2, 5, 5):
            given = feeds(tokens) | {"x": np.asfortranarray(feeds(tokens)["x"])}
            assert_right(engine.run({"x": given["x"], **constant}), given)
        # The constant; x, y and the norm for 2 tokens, and once for 5.
        assert cuda.places == [("cuda", 1)] * 7

    def test_the_graph_in_float32_where_kernels_are_missing(self, tmp_path, cuda):
        product = [
            helper.make_node("Cast", ["x"], ["half"], to=TensorProto.BFLOAT16),
            helper.make_node("MatMul", ["half", "w"], ["product"]),
            helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMax", ["y"], ["norm"]),
        ]
        weight = helper.make_tensor("w", TensorProto.BFLOAT16, [4, 6], np.zeros(24))
        bundle = write(tmp_path / "bundle", {"bfloat16": model([weight], product), "float32": constant_graph(2)})
        assert (open_engine(bundle, "net", device="cuda").run(feeds(2))["y"] == 2).all()
        assert len(cuda.options) == 2

    def test_else_the_bundles_own(self, tmp_path, cuda):
        bundle = write(
            tmp_path / "bundle", {"float16": constant_graph(1, TensorProto.FLOAT16), "float32": constant_graph(2)}
        )
        assert (open_engine(bundle, "net", device="cuda").run(feeds(2))["y"] == 1).all()

    def test_a_broken_graph_is_not_passed_over(self, tmp_path, cuda):
        bundle = write(tmp_path / "bundle", {"bfloat16": b"garbage" * 20, "float32": constant_graph(2)})
        with pytest.raises(BundleError, match="copy or build the bundle again"):
            open_engine(bundle, "net", device="cuda")

    def test_a_closed_engine_does_not_run(self, bundle, cuda):
        engine = open_engine(bundle, "net")
        engine.close()
        engine.close()
        with pytest.raises(BackendError, match="the engine of net is closed; open it again"):
            engine.run(feeds(2))

    def test_upload_without_memory(self, bundle, cuda, monkeypatch):
        def fail(*arguments: Any) -> Any:
            raise RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);")

        engine = open_engine(bundle, "net")
        monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", fail)
        with pytest.raises(OutOfMemoryError, match="cannot take the inputs of net: out of memory; ask for a smaller"):
            engine.upload({"scale": np.array([1.5], np.float32)})

    @pytest.mark.parametrize(
        ("said", "kind", "message"),
        [
            ("CUDA failure 100: no CUDA-capable device is detected ; GPU=-1", BackendError, "there is no NVIDIA GPU; "),
            ("CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version", BackendError, "too old"),
            ("CUDA failure 101: invalid device ordinal ; GPU=7", UsageError, "there is no such GPU; count from cuda:0"),
        ],
    )
    def test_in_cudas_words(self, bundle, cuda, monkeypatch, said, kind, message):
        def fail(*arguments: Any, **options: Any) -> Any:
            raise RuntimeError(said)

        monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
        with pytest.raises(kind, match=message):
            open_engine(bundle, "net", device="cuda:7")


MORE_INPUTS = INPUTS | {"ids": TensorSpec("int64", ("tokens",)), "mask": TensorSpec("bool", (1, "tokens"))}
MORE_OUTPUTS = {
    "y": TensorSpec("float32", ("tokens", 6)),
    "twice": TensorSpec("float32", ("2*tokens", 6)),
    "kept": TensorSpec("float32", ("as the mask says",)),
}


class TestBoundSession:
    """The way of a GPU, walked on the CPU with real sessions: equal to a plain run, in buffers that stay."""

    @pytest.fixture
    def session(self) -> Any:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Mul", ["product", "scale"], ["y"]),
            helper.make_node("Concat", ["y", "y"], ["twice"], axis=0),
            helper.make_node("Cast", ["ids"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["mask", "shape"], ["flat"]),
            helper.make_node("Compress", ["numbers", "flat"], ["kept"], axis=0),
        ]
        weights = [
            helper.make_tensor("w", TensorProto.FLOAT, [4, 6], WEIGHT.ravel()),
            helper.make_tensor("shape", TensorProto.INT64, [1], [-1]),
        ]
        graph = model(weights, nodes, MORE_INPUTS, MORE_OUTPUTS)
        return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])

    @pytest.fixture
    def run(self, session: Any) -> Callable[..., dict[str, np.ndarray]]:
        """A run on arrays, and on uploads, for as many tokens as ``x`` has."""
        bound = BoundSession(session, Place("cpu"), MORE_OUTPUTS)

        def run(given: dict[str, Any]) -> dict[str, np.ndarray]:
            found = bound.run(given, (), {"tokens": given["x"].shape[0]})
            return {name: download(value) for name, value in found.items()}

        return run

    def feeds(self, tokens: int, seed: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        ids, mask = random.integers(0, 99, tokens), random.integers(0, 2, (1, tokens)).astype(bool)
        return feeds(tokens, seed) | {"ids": ids, "mask": mask}

    def uploaded(self, arrays: dict[str, np.ndarray]) -> dict[str, Handle]:
        return {
            name: Handle("onnxruntime", "cpu", str(a.dtype), a.shape, upload(a, str(a.dtype), Place("cpu")))
            for name, a in arrays.items()
        }

    def test_equal_to_a_plain_run(self, session, run):
        for seed, tokens in enumerate([1, 7, 7, 3, 64, 7]):
            given = self.feeds(tokens, seed)
            constants = self.uploaded({name: given[name] for name in ("scale", "mask")})
            plain = session.run(list(MORE_OUTPUTS), given)
            for found in (run(given), run(given | constants)):
                assert list(found) == list(MORE_OUTPUTS)
                for expected, actual in zip(plain, found.values(), strict=True):
                    np.testing.assert_array_equal(actual, expected)

    def test_buffers_stay_while_shapes_do(self, run, monkeypatch):
        made, create = [], onnxruntime.OrtValue.ortvalue_from_shape_and_type
        constants = self.uploaded({"scale": np.ones(1, np.float32)})

        def record(shape: Any, dtype: Any, *place: Any) -> Any:
            made.append((tuple(shape), np.dtype(dtype).name, place))
            return create(shape, dtype, *place)

        monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", record)
        for seed in range(4):
            given = self.feeds(5, seed)
            del given["scale"]
            run(given | constants)
        here = ("cpu", 0)
        assert sorted(made) == [
            ((1, 5), "bool", here), ((5,), "int64", here), ((5, 4), "float32", here),
            ((5, 6), "float32", here), ((10, 6), "float32", here),
        ]  # fmt: skip
        run(self.feeds(6, 0) | constants)
        assert len(made) == 10

    def test_a_kept_output_is_freed_by_who_drops_it(self):
        """The session does not hold it until the next run: what is made next takes its place."""
        inputs, outputs = ({name: TensorSpec("float32", ("n",))} for name in "xy")
        graph = model([], [helper.make_node("Neg", ["x"], ["y"])], inputs, outputs)
        bound = BoundSession(onnxruntime.InferenceSession(graph), Place("cpu"), outputs)
        x = np.ones(1 << 24, np.float32)
        kept = bound.run({"x": x}, ["y"], {"n": len(x)})
        before = resident()
        del kept
        made = upload(x, "float32", Place("cpu"))
        assert made.shape() == [len(x)]
        assert resident() - before < x.nbytes / 2

    def test_two_uploads_alternate(self, session, run):
        """As the two branches of guidance do."""
        given = self.feeds(3, 0)
        branches = [self.uploaded({"scale": np.array([scale], np.float32)}) for scale in (1.5, -2)]
        for _ in range(3):
            for branch, scale in zip(branches, (1.5, -2), strict=True):
                (y,) = session.run(["y"], given | {"scale": np.array([scale], np.float32)})
                np.testing.assert_array_equal(run(given | branch)["y"], y)


class TestBrokenBundles:
    @pytest.mark.parametrize("content", [b"", b"garbage" * 20, b"\x0a\x7f half a graph"])
    def test_graph(self, tmp_path, content):
        bundle = write(tmp_path / "bundle", {"float32": content})
        with pytest.raises(BundleError, match=r"net\.float32\.onnx( is broken)?: .*; copy or build the bundle again"):
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
        with pytest.raises(
            BundleError, match=r"net\.float32\.onnx( is broken)?: .*; copy or build the bundle again"
        ) as caught:
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
            def run_with_ort_values(self, names: Any, feeds: Any) -> Any:
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
            def run_with_ort_values(self, names: Any, feeds: Any) -> Any:
                raise KeyboardInterrupt

        engine = open_engine(bundle, "net")
        monkeypatch.setattr(engine, "_session", Session())
        with pytest.raises(KeyboardInterrupt):
            engine.run(feeds(2))


class TestOnCpus:
    """Which graph a CPU runs, and what it holds of the weights."""

    def test_the_graph_for_cpus_comes_first(self, bundle, tmp_path):
        whole = bundle.file("net.float32.onnx").read_bytes()
        made = write(tmp_path / "more", {"bfloat16": b"broken", "float32": b"broken", CPU_GRAPH: whole})
        assert_right(open_engine(made, "net", device="cpu").run(feeds(2)), feeds(2))

    @pytest.mark.parametrize(
        ("quantized", "exact", "chosen"),
        [
            ("", False, CPU_GRAPH),
            ("int4-weights", False, CPU_GRAPH),
            ("fp8", False, CPU_GRAPH),
            ("int8", True, CPU_GRAPH),
            ("int8", False, "float32"),
            ("int8-weights", False, "float32"),
        ],
    )
    def test_integers_are_for_processors_that_add_them_exactly(self, quantized, exact, chosen, monkeypatch):
        monkeypatch.setattr(zimg_onnxruntime, "adds_integers_exactly", lambda: exact)
        component = Component((), {key: f"{key}.onnx" for key in ("bfloat16", "float32", CPU_GRAPH)})
        assert zimg_onnxruntime._graphs(component, Place("cpu", 0), quantized) == [f"{chosen}.onnx"]

    @pytest.mark.parametrize(
        ("parameters", "quantized", "key", "folds"),
        [
            (10**6, "", CPU_GRAPH, True),
            (10**9, "", CPU_GRAPH, False),
            (10**9, "", "float32", False),
            (10**9, "int8", CPU_GRAPH, False),
            (10**9, "int8", "float32", True),
            (10**9, "int4-weights", "float32", False),
        ],
    )
    def test_only_small_networks_are_folded(self, parameters, quantized, key, folds):
        graphs = {compute: f"{compute}.onnx" for compute in ("float32", CPU_GRAPH)}
        component = Component((), graphs, parameters=parameters)
        assert zimg_onnxruntime._folds(component, graphs[key], quantized) is folds

    @pytest.mark.parametrize("in_place", [False, True])
    def test_copies_of_weights_are_a_choice(self, in_place, bundle, monkeypatch):
        given: dict[str, str] = {}
        monkeypatch.setattr(zimg_onnxruntime, "_folds", lambda *_: False)
        monkeypatch.setattr(zimg_onnxruntime, "_largest_in_4_bits", lambda *_: 1234)
        session = onnxruntime.InferenceSession

        def opened(source: Any, options: Any, **others: Any) -> Any:
            for key in ("session.disable_prepacking", zimg_onnxruntime.FOLDED_AT_MOST):
                with contextlib.suppress(RuntimeError):
                    given[key] = options.get_session_config_entry(key)
            assert ("ConstantFolding" in others["disabled_optimizers"]) is in_place
            return session(source, options, **others)

        monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
        assert_right(open_engine(replace(bundle, in_place=in_place), "net", device="cpu").run(feeds(2)), feeds(2))
        assert given == ({"session.disable_prepacking": "1"} if in_place else {zimg_onnxruntime.FOLDED_AT_MOST: "1234"})

    def test_large_weights_stay_in_their_file(self, tmp_path):
        """A gigabyte of them, which takes no disk: opened, it must not be held."""
        root, rows = tmp_path / "large", 1 << 14
        root.mkdir()
        header, infos = safetensors.layout(root / "net.safetensors", {"w": ("bfloat16", (2 * rows, rows))}, {})
        with (root / "net.safetensors").open("wb") as out:
            out.write(header)
            out.truncate(len(header) + infos["w"].nbytes)
        tensor = external(infos["w"])
        tensor.data_type = TensorProto.BFLOAT16
        nodes = [
            helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["wide"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "turned"], ["y"]),
        ]
        ins, outs = {"x": TensorSpec("float32", ("tokens", rows))}, {"y": TensorSpec("float32", ("tokens", 2 * rows))}
        (root / "net.onnx").write_bytes(model([tensor], nodes, ins, outs))
        component = Component(("net.safetensors",), {CPU_GRAPH: "net.onnx"}, ins, outs, parameters=2 * rows * rows)
        handmade.write_bundle(root, {}, components={"net": component})
        opened = subprocess.run(
            [sys.executable, "-c", OPEN, str(root)], capture_output=True, text=True, check=True, timeout=120
        )
        assert int(opened.stdout) < 200 << 20


OPEN = """
import sys
from zimgkit.engines.base import open_engine
from zimgkit.engines.bundle import Bundle

def held(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

engine = open_engine(Bundle.open(sys.argv[1], verify=False), "net", "onnxruntime", "cpu")
print(held("VmHWM"))
"""
