"""TensorRT for RTX: an imitated plugin whose sessions run on the CPU; and the real one, which registers."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tests import handmade
from tests.fake_onnxruntime import NAME, FakePlugin, gpu
from zimgkit.engines.base import open_engine
from zimgkit.engines.bundle import Bundle, CompiledEngine, Component, TensorSpec
from zimgkit.engines.errors import BackendError, BundleError, OutOfMemoryError, UsageError, install
from zimgkit.engines.onnxruntime import tensorrt_rtx

INPUTS = {"x": TensorSpec("float32", ("batch", "tokens", 4)), "scale": TensorSpec("float32", (1,))}
OUTPUTS = {"y": TensorSpec("float32", ("batch", "tokens", 4))}
CONTEXT = "engines/tensorrt-rtx-0.5.0-sm89/net-1234.onnx"


def graph(add: float = 0) -> bytes:
    """y = scale x + add."""
    nodes = [helper.make_node("Mul", ["x", "scale"], ["product"]), helper.make_node("Add", ["product", "add"], ["y"])]
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, spec.shape) for name, spec in specs.items()]
        for specs in (INPUTS, OUTPUTS)
    ]
    weight = helper.make_tensor("add", TensorProto.FLOAT, [1], [add])
    made = helper.make_graph(nodes, "net", *values, initializer=[weight])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=11).SerializeToString()


def write(root: Path, *, compute: str = "bfloat16", engines: Any = (), **changes: Any) -> Bundle:
    """A bundle of that graph, which passes for a bfloat16 one; ``changes`` are of the entry of a compiled engine."""
    component = Component((), {compute: "net.onnx"}, INPUTS, OUTPUTS)
    files = {"net.onnx": graph(), CONTEXT: graph(add=100)}
    components = {"net": component, "table": Component(())}
    bundle = Bundle.open(handmade.write_bundle(root, files, components=components))
    if not (engines or changes):
        return bundle
    entry = {
        "component": "net", "file": CONTEXT, "backend": "tensorrt-rtx", "compiler": tensorrt_rtx.PLUGIN,
        "version": "0.5.0", "device": "sm89", "source": bundle.source_hash("net"),
        "profiles": ({"batch": (1, 1, 1), "tokens": (2, 4, 8)},),
    }  # fmt: skip
    entries = tuple(CompiledEngine(**(entry | engine)) for engine in engines or [changes])
    return Bundle.open(handmade.write_bundle(root, files, components=components, engines=entries))


def feeds(tokens: int, batch: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).standard_normal((batch, tokens, 4)).astype(np.float32)
    return {"x": x, "scale": np.array([1.5], np.float32)}


def assert_right(found: dict[str, np.ndarray], given: dict[str, np.ndarray], add: float = 0) -> None:
    np.testing.assert_allclose(found["y"], given["x"] * given["scale"] + add, rtol=1e-6)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> FakePlugin:
    return FakePlugin(monkeypatch)


def ranges_of(options: dict[str, str]) -> dict[str, str]:
    return {key[11:14]: value for key, value in options.items() if key.startswith("nv_profile_")}


class TestCompiledWhenRun:
    """Without an engine in the bundle."""

    def test_for_the_shapes_it_meets(self, tmp_path, plugin):
        engine = open_engine(write(tmp_path), "net", "tensorrt-rtx")
        assert not plugin.opened
        assert_right(engine.run(feeds(3)), feeds(3))
        ((path, devices, options, fixed),) = plugin.opened
        assert (path, devices, fixed) == ("net.onnx", plugin.gpus, {"batch": 1, "tokens": 3})
        assert ranges_of(options) == {}
        assert options["nv_use_external_data_initializer"] == "1"
        assert Path(options["nv_runtime_cache_path"]).is_dir()

    def test_again_for_others_and_then_for_all_between(self, tmp_path, plugin):
        engine = open_engine(write(tmp_path), "net", "tensorrt-rtx")
        for tokens in (5, 5, 3, 4, 5, 3, 9, 7):
            assert_right(engine.run(feeds(tokens)), feeds(tokens))
        assert [fixed for *_, fixed in plugin.opened] == [{"batch": 1, "tokens": 5}, {}, {}]
        assert ranges_of(plugin.opened[1][2]) == {
            "min": "x:1x3x4,scale:1", "opt": "x:1x3x4,scale:1", "max": "x:1x5x4,scale:1",
        }  # fmt: skip
        assert ranges_of(plugin.opened[2][2]) == {
            "min": "x:1x3x4,scale:1", "opt": "x:1x9x4,scale:1", "max": "x:1x9x4,scale:1",
        }  # fmt: skip

    def test_what_was_uploaded_outlives_it(self, tmp_path, plugin):
        engine = open_engine(write(tmp_path), "net", "tensorrt-rtx", "cuda")
        constant = engine.upload({"scale": np.array([1.5], np.float32)})
        for tokens in (2, 6, 2):
            assert_right(engine.run({"x": feeds(tokens)["x"], **constant}), feeds(tokens))
        assert set(plugin.places) == {("cuda", 0)}

    def test_without_a_folder_for_its_cache(self, tmp_path, plugin, monkeypatch):
        (tmp_path / "file").write_bytes(b"")
        monkeypatch.setattr(tensorrt_rtx, "user_cache_path", lambda name: tmp_path / "file" / name)
        assert_right(open_engine(write(tmp_path / "b"), "net", "tensorrt-rtx").run(feeds(2)), feeds(2))
        assert "nv_runtime_cache_path" not in plugin.opened[0][2]

    def test_a_graph_that_is_refused(self, tmp_path, plugin, monkeypatch):
        def refuse(*given: Any, **more: Any) -> Any:
            raise RuntimeError("[ONNXRuntimeError] : 11 : EP_FAIL : Failed to create\n serialized engine")

        monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
        engine = open_engine(write(tmp_path), "net", "tensorrt-rtx")
        with pytest.raises(BackendError) as caught:
            engine.run(feeds(2))
        assert re.fullmatch(
            r"TensorRT for RTX cannot load .*net\.onnx: .* Failed to create serialized engine; use --backend "
            r"tensorrt, onnxruntime or torch",
            str(caught.value),
        )

    def test_a_bundle_in_float32(self, tmp_path, plugin):
        with pytest.raises(BackendError, match=r"computes in float32, .*; build the bundle with --precision bf16, or"):
            open_engine(write(tmp_path, compute="float32"), "net", "tensorrt-rtx")

    def test_a_table(self, tmp_path, plugin):
        with pytest.raises(BackendError, match="table is a table of tensors and has no graph to run"):
            open_engine(write(tmp_path), "table", "tensorrt-rtx")


class TestCompiledAhead:
    def test_it_is_what_runs(self, tmp_path, plugin):
        engine = open_engine(write(tmp_path, device="sm89"), "net", "tensorrt-rtx")
        for tokens in (2, 8, 5):
            assert_right(engine.run(feeds(tokens)), feeds(tokens), add=100)
        ((path, _, options, fixed),) = plugin.opened
        assert (path, fixed, ranges_of(options)) == ("net-1234.onnx", {}, {})
        assert options["nv_multi_profile_enable"] == "0"
        assert plugin.profiles == ["", "", ""]

    def test_the_narrowest_profile(self, tmp_path, plugin):
        profiles = (
            {"batch": (1, 1, 4), "tokens": (2, 4, 8)},
            {"batch": (1, 1, 1), "tokens": (4, 4, 4)},
            {"batch": (1, 1, 1), "tokens": (4, 6, 16)},
        )
        engine = open_engine(write(tmp_path, profiles=profiles), "net", "tensorrt-rtx")
        for tokens, batch in ((4, 1), (4, 2), (5, 1), (16, 1)):
            given = feeds(tokens, batch)
            assert_right(engine.run(given), given, add=100)
        assert plugin.profiles == ["1", "0", "2", "2"]
        assert plugin.opened[0][2]["nv_multi_profile_enable"] == "1"

    def test_a_size_it_does_not_serve(self, tmp_path, plugin):
        bundle = write(tmp_path, device="sm89")
        engine = open_engine(bundle, "net", "tensorrt-rtx")
        with pytest.raises(BackendError) as caught:
            engine.run(feeds(9))
        assert str(caught.value) == (
            "net was compiled for 1 batch and 2 to 8 tokens, not for 'x' of shape (1, 9, 4); compile it for that too, "
            f"with --size, --max-size or --max-prompt-tokens: zimg-export compile {bundle.root} --backend tensorrt-rtx"
        )

    def test_of_another_version(self, tmp_path, plugin):
        bundle = write(tmp_path, engines=[{"version": "0.4.0"}, {"version": "0.4.1", "device": "sm86"}])
        with pytest.raises(BackendError) as caught:
            open_engine(bundle, "net", "tensorrt-rtx")
        assert str(caught.value) == (
            f"{bundle.root} has engines of net for TensorRT for RTX of version 0.4.0 on sm89, version 0.4.1 on sm86; "
            "this machine has version 0.5.0 on sm89; "
            f"compile it here: zimg-export compile {bundle.root} --backend tensorrt-rtx"
        )

    def test_for_another_gpu(self, tmp_path, plugin):
        plugin.gpus = [gpu(target_architecture="sm120")]
        with pytest.raises(BackendError, match=r"version 0\.5\.0 on sm89; this machine has version 0\.5\.0 on sm120"):
            open_engine(write(tmp_path, device="sm89"), "net", "tensorrt-rtx")

    def test_from_other_weights(self, tmp_path, plugin):
        with pytest.raises(
            BackendError, match=r"net was compiled from another graph or other weights .*; compile it ag"
        ):
            open_engine(write(tmp_path, source="0" * 64), "net", "tensorrt-rtx")

    def test_engines_of_other_backends_do_not_count(self, tmp_path, plugin):
        engine = open_engine(write(tmp_path, backend="tensorrt", version="11"), "net", "tensorrt-rtx")
        assert_right(engine.run(feeds(2)), feeds(2))

    def test_one_that_does_not_load(self, tmp_path, plugin, monkeypatch):
        def refuse(*given: Any, **more: Any) -> Any:
            raise RuntimeError("EP_FAIL : TensorRT EP failed to deserialize engine cache")

        bundle = write(tmp_path, device="sm89")
        monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
        with pytest.raises(BackendError, match=r"cannot load .*net-1234\.onnx: .*; compile it again: zimg-export comp"):
            open_engine(bundle, "net", "tensorrt-rtx")

    @pytest.mark.parametrize("name", [CONTEXT, "net.onnx"])
    def test_one_whose_file_is_gone(self, tmp_path, plugin, name):
        """The context's, or the one it points into."""
        bundle = write(tmp_path, data="net.onnx")
        (bundle.root / name).unlink()
        with pytest.raises(BundleError, match="is missing"):
            open_engine(bundle, "net", "tensorrt-rtx")

    def test_one_that_points_out_of_the_bundle(self, tmp_path, plugin):
        with pytest.raises(BundleError, match="is of no component with a graph, or in no list of files"):
            write(tmp_path, data="../net.engine")


class TestRuns:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x": np.zeros((2, 5), np.float32)}, "net takes 'x' in the shape"),
            ({"z": np.zeros(1)}, "net has no input 'z'"),
            (
                {"x": object()},
                "net takes .x. as a numpy array, or as a handle of tensorrt-rtx on cuda:0, not",
            ),
        ],
    )
    def test_inputs_that_do_not_fit(self, tmp_path, plugin, changes, message):
        with pytest.raises(BackendError, match=message):
            open_engine(write(tmp_path), "net", "tensorrt-rtx").run(feeds(2) | changes)

    def test_closed(self, tmp_path, plugin):
        engine = open_engine(write(tmp_path, device="sm89"), "net", "tensorrt-rtx")
        engine.close()
        engine.close()
        with pytest.raises(BackendError, match="the engine of net is closed; open it again"):
            engine.run(feeds(2))

    def test_without_memory(self, tmp_path, plugin, monkeypatch):
        def fail(*given: Any, **more: Any) -> Any:
            raise RuntimeError("CUDA failure 2: out of memory")

        engine = open_engine(write(tmp_path), "net", "tensorrt-rtx")
        monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", fail)
        with pytest.raises(OutOfMemoryError, match="cannot take the inputs of net: out of memory; ask for a smaller"):
            engine.upload({"scale": np.ones(1, np.float32)})
        monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
        with pytest.raises(OutOfMemoryError):
            engine.run(feeds(2))


class TestBuild:
    """Attention without a fused kernel is taken apart, and nothing else is tried twice."""

    def test_once_where_it_works(self):
        assert tensorrt_rtx.build(lambda options: options) == {}

    def test_with_attention_taken_apart(self):
        def make(options: dict[str, str]) -> str:
            if not options:
                raise RuntimeError("no kernel")
            return options["nv_op_types_to_exclude"]

        assert tensorrt_rtx.build(make) == "Attention"

    def test_the_first_error_is_told(self):
        def make(options: dict[str, str]) -> None:
            raise RuntimeError(f"failed with {options}")

        with pytest.raises(RuntimeError, match=re.escape("failed with {}")):
            tensorrt_rtx.build(make)

    def test_memory_does_not_come_back(self):
        tried = []

        def make(options: dict[str, str]) -> None:
            tried.append(options)
            raise RuntimeError("CUDA failure 2: out of memory")

        with pytest.raises(RuntimeError):
            tensorrt_rtx.build(make)
        assert tried == [{}]


class TestDevices:
    def test_not_installed(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, tensorrt_rtx.PLUGIN, None)
        with pytest.raises(BackendError, match=rf"plugin .* is not installed; {re.escape(install('tensorrt-rtx'))}"):
            open_engine(write(tmp_path), "net", "tensorrt-rtx")

    def test_onnxruntime_that_takes_no_plugins(self, plugin, monkeypatch):
        monkeypatch.delattr(onnxruntime, "register_execution_provider_library")
        with pytest.raises(BackendError, match=r"onnxruntime .* takes no plugins; pip install -U"):
            tensorrt_rtx.open_device()

    def test_registered_before(self, plugin):
        plugin.fails = RuntimeError(f"FAIL : library is already registered under {NAME}")
        assert tensorrt_rtx.open_device() == tensorrt_rtx.Device(plugin.gpus[0], 0, "sm89", "0.5.0")

    @pytest.mark.parametrize("library", ["libcuda.so.1", "libnvidia-ml.so.1"])
    def test_no_driver(self, plugin, library):
        plugin.fails = RuntimeError(
            f"Failed to load library x.so with error: {library}: cannot open shared object file"
        )
        with pytest.raises(BackendError) as caught:
            tensorrt_rtx.open_device()
        expected = "TensorRT for RTX needs an NVIDIA driver, and there is none"
        assert str(caught.value) == f"{expected}; use --backend tensorrt, onnxruntime or torch"

    def test_a_plugin_that_does_not_load(self, plugin):
        plugin.fails = RuntimeError("Failed to load library x.so\nwith error: invalid ELF header")
        with pytest.raises(
            BackendError, match=r"does not load: Failed to load library x\.so with .*; install it again"
        ):
            tensorrt_rtx.open_device()

    def test_no_gpu(self, plugin):
        plugin.gpus = []
        plugin.hardware = [SimpleNamespace(vendor_id=0x1022, notes="an AMD CPU")]
        with pytest.raises(BackendError) as caught:
            tensorrt_rtx.open_device()
        assert str(caught.value) == (
            "TensorRT for RTX accepts no GPU of this machine (there is no NVIDIA GPU); it needs a GeForce or RTX card "
            "of compute capability 8.6, 8.9, or 12.0 and up; use --backend tensorrt, onnxruntime or torch"
        )

    def test_a_gpu_it_refuses(self, plugin):
        plugin.gpus = []
        note = "NvTensorRTRTX EP does not support GPU with Compute Capability 9.0."
        plugin.hardware = [SimpleNamespace(vendor_id=0x10DE, notes=note)] * 2
        with pytest.raises(BackendError, match=r"of this machine \(NvTensorRTRTX EP .* Capability 9\.0\); it needs a"):
            tensorrt_rtx.open_device()

    def test_one_of_several(self, plugin):
        plugin.gpus = [gpu(device_id="1"), gpu(device_id="3", target_architecture="sm120")]
        assert tensorrt_rtx.open_device().index == 1
        assert tensorrt_rtx.open_device(3).architecture == "sm120"

    def test_a_number_it_does_not_accept(self, tmp_path, plugin):
        plugin.gpus = [gpu(device_id="1"), gpu(device_id="3")]
        with pytest.raises(UsageError, match="does not accept cuda:0; choose cuda:1, cuda:3; it needs a GeForce"):
            open_engine(write(tmp_path), "net", "tensorrt-rtx", "cuda:0")

    @pytest.mark.parametrize("device", ["cpu", "gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA"])
    def test_unknown(self, tmp_path, plugin, device):
        with pytest.raises(UsageError) as caught:
            open_engine(write(tmp_path), "net", "tensorrt-rtx", device)
        assert str(caught.value) == f"TensorRT for RTX has no device {device!r}; choose cuda or cuda:N"


DRIVER = {
    "libcuda.so.1": "cuCtxCreate_v4 cuCtxDestroy_v2 cuCtxGetCurrent cuCtxPopCurrent_v2 cuCtxPushCurrent_v2 "
    "cuCtxSetCurrent cuDestroyExternalMemory cuDestroyExternalSemaphore cuExternalMemoryGetMappedBuffer "
    "cuGetErrorString cuImportExternalMemory cuImportExternalSemaphore cuInit cuSignalExternalSemaphoresAsync "
    "cuStreamGetCtx cuWaitExternalSemaphoresAsync",
    "libnvidia-ml.so.1": "nvmlErrorString nvmlInit_v2 nvmlShutdown nvmlSystemGetDriverVersion",
}
"""What the plugin takes from the driver. Stubs that refuse everything make it load where there is none."""


class TestRealPlugin:
    """In processes of their own: what the plugin loads, it loads for good."""

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        if not importlib.util.find_spec(tensorrt_rtx.PLUGIN):
            pytest.skip(f"{tensorrt_rtx.PLUGIN} is not installed")

    def open_device(self, **environment: str) -> str:
        code = (
            "from zimgkit.engines.onnxruntime import tensorrt_rtx\nfrom zimgkit.engines.errors import ZimgError\n"
            "try: print(tensorrt_rtx.open_device())\nexcept ZimgError as error: print(error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def test_without_a_driver(self):
        if shutil.which("nvidia-smi"):
            pytest.skip("here is a driver")
        assert self.open_device() == (
            "TensorRT for RTX needs an NVIDIA driver, and there is none; use --backend tensorrt, onnxruntime or torch"
        )

    def test_with_a_driver_and_no_gpu(self, tmp_path):
        compiler = shutil.which("cc")
        if shutil.which("nvidia-smi") or not compiler:
            pytest.skip("here is a driver" if compiler else "there is no C compiler to make a driver's stub with")
        for library, functions in DRIVER.items():
            source = tmp_path / "stub.c"
            source.write_text("\n".join(f"int {name}(void) {{ return 100; }}" for name in functions.split()))
            command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", tmp_path / library, source]
            subprocess.run(command, check=True)
        said = self.open_device(LD_LIBRARY_PATH=f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}")
        assert said.startswith("TensorRT for RTX accepts no GPU of this machine (there is no NVIDIA GPU); it needs a ")
