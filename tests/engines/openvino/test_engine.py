"""Real bundles on OpenVINO, against ONNX Runtime; bad graphs, devices and installations; silence."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests import handmade
from zimgkit.engines.base import open_engine
from zimgkit.engines.bundle import Bundle, Component, Quantization, TensorSpec
from zimgkit.engines.cpu import multiplies_bfloat16
from zimgkit.engines.errors import BackendError, BundleError, OutOfMemoryError, UsageError
from zimgkit.engines.openvino import api, engine, graph
from zimgkit.engines.torch.engine import open_engine as open_torch
from zimgkit.runtime import Pipeline, demo_models

SIZES = {"batch": 1, "image_tokens": 24, "all_tokens": 56, "height": 8, "width": 12, "tokens": 9}
SIZES |= {"caption_tokens": 32, "text_tokens": 32}
OTHER = {"batch": 2, "image_tokens": 9, "all_tokens": 41, "height": 6, "width": 6}
DEMO = {"z-image": "zimg-tiny-z", "qwen-image": "zimg-tiny-qwen"}


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests share the processors."""
    for name in ("AS_WRITTEN", "IN_BFLOAT16", "IN_8_BITS"):
        monkeypatch.setattr(engine, name, getattr(engine, name) | {"INFERENCE_NUM_THREADS": "1"})


def feeds_of(component: Component, seed: int = 0, **sizes: int) -> dict[str, Any]:
    random, sizes = np.random.default_rng(seed), SIZES | sizes
    made = {}
    for name, spec in component.inputs.items():
        shape = [sizes.get(side, 16) if isinstance(side, str) else side for side in spec.shape]
        made[name] = {
            "bool": lambda shape=shape: np.zeros(shape, bool),
            "int64": lambda shape=shape: random.integers(0, 50, shape),
        }.get(spec.dtype, lambda shape=shape: np.clip(random.standard_normal(shape), -1, 1).astype(np.float32))()
    return made


def errors(bundle: Bundle, reference: Bundle | None = None, **options: Any) -> dict[str, float]:
    """The largest relative error of each component, in one shape, in another, and in the first again.

    Args:
        bundle: it runs on OpenVINO, or on PyTorch with these options.
        reference: runs on ONNX Runtime, in float32.
        options: of PyTorch.
    """
    found: dict[str, float] = {}
    for name, component in bundle.manifest.components.items():
        if not component.graphs:
            continue
        tried = open_torch(bundle, name, "cpu", **options) if options else open_engine(bundle, name, "openvino")
        right = open_engine(reference or bundle, name, "onnxruntime", "cpu")
        for seed, sizes in enumerate(({}, OTHER, {})):
            given = feeds_of(component, seed, **sizes)
            got, wanted = tried.run(given), right.run(given)
            assert list(got) == list(wanted)
            for key, value in wanted.items():
                error = float(np.linalg.norm(got[key] - value) / np.linalg.norm(value))
                found[name] = max(found.get(name, 0), error)
    assert len(found) == sum(bool(component.graphs) for component in bundle.manifest.components.values()) >= 4
    return found


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
class TestComponents:
    def test_in_float32(self, bundle_of: Callable[..., Path], family: str) -> None:
        assert max(errors(Bundle.open(bundle_of(family))).values()) < 1e-5

    def test_in_bfloat16_on_a_cpu_without_such_products(self, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
        monkeypatch.setattr(engine, "multiplies_bfloat16", lambda core, place: False)
        assert max(errors(Bundle.open(demo_models.locate(DEMO[family]))).values()) < 1e-5

    @pytest.mark.skipif(not multiplies_bfloat16(), reason="OpenVINO cuts bits off where the CPU has no such products")
    def test_in_bfloat16(self, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
        """It is as far off as PyTorch is in that, whose own error changes threefold with the numbers."""
        monkeypatch.setattr(engine, "multiplies_bfloat16", lambda core, place: True)
        bundle = Bundle.open(demo_models.locate(DEMO[family]))
        found, floor = errors(bundle), errors(bundle, compute="bfloat16")
        assert {name: 0 < error < 4 * floor[name] for name, error in found.items()} == dict.fromkeys(found, True)


@pytest.mark.parametrize(
    "changes", [{}, {"vision": {"depth": 2, "fullatt_block_indexes": [1]}}], ids=["no windows", "windows"]
)
def test_editing(bundle_of: Callable[..., Path], changes: dict[str, Any]) -> None:
    """Every graph, of variants too, with what a call gives it. Without windows their inputs are not read."""
    found: dict[str, float] = {}

    def opened(bundle: Bundle, component: str, *where: Any) -> Any:
        tried, reference = open_engine(bundle, component, *where), open_engine(bundle, component, "onnxruntime", "cpu")
        run = tried.run

        def both(feeds: Any, keep: Any = ()) -> Any:
            given = {name: feed if isinstance(feed, np.ndarray) else feed.value for name, feed in feeds.items()}
            got = run(feeds, keep)
            for name, right in reference.run(given).items():
                error = float(np.linalg.norm(got[name] - right) / np.linalg.norm(right))
                found[component] = max(found.get(component, 0), error)
            return got

        tried.run = both  # type: ignore[method-assign]
        return tried

    bundle = Bundle.open(bundle_of("qwen-image-edit-plus", **changes))
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, shape, np.uint8) for shape in ((97, 61, 3), (64, 90, 3))]
    with Pipeline(bundle, backend="openvino", opener=opened) as pipeline:
        for images in (pictures, pictures[:1]):
            pipeline("make the cup blue", image=images, height=64, width=80, num_inference_steps=2)
    assert {"vision_encoder", "text_encoder.pictures", "vae_encoder", "denoiser.conditions"} < found.keys()
    assert max(found.values()) < 1e-5


def single(root: Path, change: Callable[[onnx.ModelProto], None] = lambda model: None) -> Bundle:
    """A bundle of ``y = x weight``, whose weight lies in a file."""
    weight = np.eye(4, dtype=np.float32)
    stored = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=(4, 4), data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights.safetensors"), ("offset", "8"), ("length", "64")):
        stored.external_data.add(key=key, value=value)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    net = helper.make_graph([helper.make_node("MatMul", ["x", "weight"], ["y"])], "net", [x], [y], [stored])
    model = helper.make_model(net, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    change(model)
    spec = TensorSpec("float32", ("n", 4))
    entry = Component(("weights.safetensors",), {"float32": "net.onnx"}, {"x": spec}, {"y": spec})
    files = {"net.onnx": model.SerializeToString(), "weights.safetensors": b"\2\0\0\0\0\0\0\0" + weight.tobytes()}
    return Bundle.open(handmade.write_bundle(root, files, components={"net": entry}))


def pointing(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for pair in model.graph.initializer[0].external_data:
            if pair.key == key:
                pair.value = value

    return change


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of any size stay in their files."""
    monkeypatch.setattr(graph, "SMALL", 0)


class TestGraphs:
    @pytest.mark.usefixtures("mapped")
    def test_weights_stay_in_their_files(self, tmp_path: Path) -> None:
        found = graph.read_graph(single(tmp_path / "bundle"), "net.onnx")
        assert isinstance(found.weights["weight"].base, np.memmap)
        model = api.load().Core().read_model(io.BytesIO(found.model))
        graph.insert_weights(model, found)
        (constant,) = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
        assert constant.data.ctypes.data == found.weights["weight"].ctypes.data
        assert [port.any_name for port in model.inputs] == found.inputs == ["x"]

    @pytest.mark.usefixtures("mapped")
    def test_weights_in_bfloat16_are_not_kept_in_float32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a CPU without products for bfloat16; the results are right, too."""
        monkeypatch.setattr(engine, "multiplies_bfloat16", lambda core, place: False)
        bundle = Bundle.open(demo_models.locate("zimg-tiny-z"))
        opened = engine.open_engine(bundle, "denoiser")
        products = [
            node.get_rt_info()["runtimePrecision"]
            for node in opened._model.get_runtime_model().get_ops()
            if node.get_rt_info()["layerType"] == "FullyConnected"
        ]
        assert len(products) > 20
        assert set(products) == {"bf16"}  # The type of its weights.
        assert max(errors(bundle).values()) < 1e-5

    @pytest.mark.usefixtures("mapped")
    def test_of_mapped_weights_of_another_size(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="weight has another size than its graph says; copy or build the bundle"):
            open_engine(single(tmp_path / "bundle", pointing("length", "32")), "net", "openvino")

    @pytest.mark.parametrize("small", [0, 1 << 16])
    def test_nothing_is_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int) -> None:
        monkeypatch.setattr(graph, "SMALL", small)
        bundle = single(tmp_path / "bundle")
        (tmp_path / "bundle").chmod(0o500)
        before = sorted(tmp_path.rglob("*"))
        given = np.arange(8, dtype=np.float32).reshape(2, 4)
        np.testing.assert_array_equal(open_engine(bundle, "net", "openvino").run({"x": given})["y"], given)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(
        ("key", "value", "says"),
        [
            ("offset", "9", "net.onnx is broken: "),
            ("offset", "-8", "net.onnx is broken: "),
            ("offset", "eight", "net.onnx is broken: "),
            ("length", "72", "net.onnx is broken: "),
            ("length", "9" * 30, "net.onnx is broken: "),
            ("location", "/etc/passwd", "net.onnx is broken: "),
            ("location", "../other", "net.onnx is broken: "),
            ("location", "other", "net.onnx is broken: "),
            ("location", "*/_ORT_MEM_ADDR_/*", "net.onnx is broken: "),
        ],
    )
    def test_of_weights_that_are_not_there(self, tmp_path: Path, key: str, value: str, says: str) -> None:
        with pytest.raises(BundleError, match=says):
            open_engine(single(tmp_path / "bundle", pointing(key, value)), "net", "openvino")

    def test_of_weights_of_another_size(self, tmp_path: Path) -> None:
        with pytest.raises(BackendError, match=r"OpenVINO cannot load net: .*; use --backend onnxruntime"):
            open_engine(single(tmp_path / "bundle", pointing("length", "32")), "net", "openvino")

    @pytest.mark.parametrize("content", [b"", b"no graph", b"\0" * 100])
    def test_of_another_kind(self, tmp_path: Path, content: bytes) -> None:
        bundle = single(tmp_path / "bundle")
        (bundle.root / "net.onnx").write_bytes(content)
        with pytest.raises(BundleError, match=r"net.onnx is no graph that zimgkit wrote|is not what the manifest"):
            open_engine(bundle, "net", "openvino")

    def test_an_operator_that_there_is_not(self, tmp_path: Path) -> None:
        def change(model: onnx.ModelProto) -> None:
            model.graph.node[0].op_type = "Nothing"

        with pytest.raises(BackendError, match=r"OpenVINO cannot load net: .*Nothing") as caught:
            open_engine(single(tmp_path / "bundle", change), "net", "openvino")
        assert "\n" not in str(caught.value)

    def test_opened_by_two_at_once(self, tmp_path: Path) -> None:
        bundle, given = single(tmp_path / "bundle"), np.ones((3, 4), np.float32)
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _: open_engine(bundle, "net", "openvino").run({"x": given})["y"], range(8)):
                np.testing.assert_array_equal(found, given)


class TestDevices:
    @pytest.mark.parametrize("device", ["cuda", "cpu:1", "gpu:", "gpu:99999", "GPU", "gpu.0"])
    def test_that_openvino_does_not_know(self, tmp_path: Path, device: str) -> None:
        with pytest.raises(UsageError, match=r"OpenVINO has no device .*; choose cpu, gpu, gpu:N or npu"):
            open_engine(single(tmp_path / "bundle"), "net", "openvino", device)

    @pytest.mark.parametrize(("device", "name"), [("gpu", "gpu:0"), ("gpu:7", "gpu:7"), ("npu", "npu:0")])
    def test_that_are_not_there(self, monkeypatch: pytest.MonkeyPatch, device: str, name: str) -> None:
        core = type("Core", (), {"available_devices": ["CPU"]})
        with pytest.raises(UsageError, match=f"finds no device {name} on this machine; choose of what there is: cpu"):
            engine._find_device(core, engine._parse_device(device))

    def test_names(self) -> None:
        """A GPU alone has no number; unknown kinds are passed over."""
        one = type("Core", (), {"available_devices": ["CPU", "GPU", "NPU", "GNA"]})
        two = type("Core", (), {"available_devices": ["CPU", "GPU.0", "GPU.1"]})
        assert [engine._find_device(one, name) for name in ("cpu", "gpu:0", "npu:0")] == ["CPU", "GPU", "NPU"]
        assert [engine._find_device(two, name) for name in ("gpu:0", "gpu:1")] == ["GPU.0", "GPU.1"]

    def test_a_cpu_without_avx2(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine, "lacks_avx2", lambda flags: True)
        with pytest.raises(BackendError, match="OpenVINO needs a CPU with AVX2, and this one has none; use --backend"):
            open_engine(single(tmp_path / "bundle"), "net", "openvino")

    def test_a_component_that_has_no_graph(self, tmp_path: Path) -> None:
        with pytest.raises(BackendError, match="is a table of tensors"):
            open_engine(Bundle.open(handmade.write_bundle(tmp_path, {})), "net", "openvino")

    def test_memory_that_there_is_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine, "COMPILING", 1 << 60)
        with pytest.raises(OutOfMemoryError, match="OpenVINO cannot load net: out of memory; ask for"):
            open_engine(single(tmp_path / "bundle"), "net", "openvino")

    def test_memory_that_runs_out_while_it_opens(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*given: Any) -> Any:
            raise RuntimeError("Exception from a.cpp:1:\nstd::bad_alloc\n")

        monkeypatch.setattr(engine, "_compile", full)
        with pytest.raises(OutOfMemoryError, match="OpenVINO cannot load net: out of memory; ask for"):
            open_engine(single(tmp_path / "bundle"), "net", "openvino")

    def test_fp8(self, tmp_path: Path) -> None:
        """Opening would take several times the stored weights."""
        bundle = single(tmp_path / "bundle")
        quantized = msgspec.structs.replace(bundle.manifest, quantization=Quantization("fp8"))
        with pytest.raises(BackendError, match=r"no kernels for float8 on CPUs: .*onnxruntime, or .*int8$"):
            open_engine(replace(bundle, manifest=quantized), "net", "openvino")


class TestInstallation:
    @pytest.fixture(autouse=True)
    def afresh(self) -> Iterator[None]:
        api.load.cache_clear()
        yield
        api.load.cache_clear()

    def test_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openvino", None)
        with pytest.raises(BackendError, match=r"openvino is not installed; .*pip install '\.\[openvino\]'"):
            api.load()

    @pytest.mark.parametrize(
        ("version", "taken"), [("2024.6.0-1", False), ("2025.4.1", False), ("2026.0.0-20-a", True)]
    )
    def test_versions(self, monkeypatch: pytest.MonkeyPatch, version: str, taken: bool) -> None:
        module = ModuleType("openvino")
        module.__dict__["__version__"] = version
        monkeypatch.setitem(sys.modules, "openvino", module)
        if taken:
            assert api.load() is module
            return
        with pytest.raises(BackendError, match=r"openvino 202.* is too old: 2026.0 or newer is needed; .*\[openvino\]"):
            api.load()

    def test_without_onnx(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnx", None)
        bundle = Bundle.open(demo_models.locate("zimg-tiny-z"))
        with pytest.raises(BackendError, match=r"needs onnx; .*pip install '\.\[openvino\]'"):
            open_engine(bundle, "conditioner", "openvino")


def test_no_telemetry(tmp_path: Path) -> None:
    """It would leave a folder ``intel`` in the home, and send that it was imported; nothing of it is even loaded."""
    code = """if True:
        import sys
        from zimgkit.engines.base import open_engine
        from zimgkit.engines.bundle import Bundle
        from zimgkit.runtime import demo_models
        open_engine(Bundle.open(demo_models.locate("zimg-tiny-z")), "conditioner", "openvino")
        print([name for name in sys.modules if "telemetry" in name and name.startswith("openvino_")])
        print("openvino_telemetry" in sys.modules)
    """
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[]\nFalse\n"), done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {".cache"}
