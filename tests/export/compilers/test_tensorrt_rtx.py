"""Engine contexts into a bundle, by an imitated compiler that writes what the plugin's writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import helper

from tests import handmade
from zimgkit.engines.bundle import Bundle, Component, TensorSpec
from zimgkit.engines.errors import BackendError, BundleError, OutOfMemoryError, OutputError, UsageError
from zimgkit.engines.onnxruntime import tensorrt_rtx
from zimgkit.export.compilers.tensorrt_rtx import compile_contexts

INPUTS = {"x": TensorSpec("float32", ("batch", "tokens", 4)), "scale": TensorSpec("float32", (1,))}
OUTPUTS = {"y": TensorSpec("float32", ("batch", "tokens", 4))}
RANGES = {"net": ({"batch": (1, 1, 2), "tokens": (2, 4, 8)},), "other": ({"batch": (1, 1, 1), "tokens": (4, 4, 4)},)}
FOLDER = "engines/tensorrt-rtx-0.5.0-sm89"


def context(nodes: int, engine: str) -> bytes:
    """What the plugin compiles a graph to, as far as it is read here."""
    made = [
        helper.make_node(
            "EPContext", ["x", "scale"], [f"y{i}"], domain="com.microsoft", ep_cache_context=engine, main=1
        )
        for i in range(nodes)
    ]
    return helper.make_model(helper.make_graph(made, "net", [], [])).SerializeToString()


class Compiler:
    """``onnxruntime.ModelCompiler``, imitated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.nodes, self.engines = 1, 1
        self.fails: list[Exception | None] = []
        device = tensorrt_rtx.Device(object(), 0, "sm89", "0.5.0")
        monkeypatch.setattr(tensorrt_rtx, "open_device", lambda: device)
        monkeypatch.setattr(tensorrt_rtx, "session_options", lambda ort, *given: given)
        monkeypatch.setattr(onnxruntime, "ModelCompiler", self._compiler)
        self.device = device

    def _compiler(self, options: Any, graph: str, *, flags: Any) -> Compiler:
        assert flags == onnxruntime.OrtCompileApiFlags.ERROR_IF_NO_NODES_COMPILED
        self.asked.append((graph, *options))
        return self

    def compile_to_file(self, path: str) -> None:
        folder = Path(path).parent
        assert not list(folder.iterdir())
        for index in range(self.engines):
            (folder / f"{tensorrt_rtx.PLUGIN}_42_{index}.engine").write_bytes(b"engine")
        if self.fails and (error := self.fails.pop(0)):
            raise error
        Path(path).write_bytes(context(self.nodes, f"{tensorrt_rtx.PLUGIN}_42_0.engine"))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(monkeypatch)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    graphs = {"bfloat16": "net.onnx", "float32": "net.float32.onnx"}
    components = {
        "net": Component((), graphs, INPUTS, OUTPUTS),
        "other": Component((), {"bfloat16": "other.onnx"}, INPUTS, OUTPUTS),
        "plain": Component((), {"float32": "net.float32.onnx"}, INPUTS, OUTPUTS),
        "table": Component(()),
    }
    # The smallest graphs: a version, and the name as the producer's, so that no two are equal.
    names = ("net.onnx", "net.float32.onnx", "other.onnx")
    files = {name: b"\x08\x0a\x1a" + bytes([len(name)]) + name.encode() for name in names}
    return Bundle.open(handmade.write_bundle(tmp_path / "bundle", files, components=components))


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_components(bundle, compiler, tmp_path):
    seen = []
    entries = compile_contexts(bundle, ["net", "other"], RANGES, tmp_path / "out", lambda *given: seen.append(given))
    assert [(entry.component, entry.profiles) for entry in entries] == list(RANGES.items())
    for entry in entries:
        assert (entry.backend, entry.compiler) == ("tensorrt-rtx", "onnxruntime_ep_nv_tensorrt_rtx")
        assert (entry.version, entry.device) == ("0.5.0", "sm89")
        assert entry.source == bundle.source_hash(entry.component)
        (node,) = onnx.load(tmp_path / "out" / entry.file, load_external_data=False).graph.node
        kept = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert kept == {"ep_cache_context": Path(entry.data).name.encode(), "main": 1}
        assert (tmp_path / "out" / entry.data).read_bytes() == b"engine"
    assert files(tmp_path / "out") == sorted(name for entry in entries for name in (entry.file, entry.data))
    assert {Path(name).parent.as_posix() for name in files(tmp_path / "out")} == {FOLDER}
    assert compiler.asked == [
        (str(bundle.file(f"{name}.onnx")), compiler.device, INPUTS, RANGES[name], {}) for name in ("net", "other")
    ]
    assert seen == [("compile net", 0, 1), ("compile net", 1, 1), ("compile other", 0, 1), ("compile other", 1, 1)]


def test_the_engine_finds_them(bundle, compiler):
    """Entered into the manifest, they are what the backend chooses on such a device."""
    (entry,) = compile_contexts(bundle, ["net"], RANGES, bundle.root)
    content = {name: (bundle.root / name).read_bytes() for name in files(bundle.root) if name != "bundle.json"}
    components = bundle.manifest.components
    again = Bundle.open(handmade.write_bundle(bundle.root, content, components=components, engines=(entry,)))
    assert tensorrt_rtx.choose_engine(again, "net", compiler.device) == entry
    assert again.file(entry.file).parent == again.file(entry.data).parent


def test_once_more_beside_the_first(bundle, compiler, tmp_path):
    """What a manifest still names is not touched."""
    for _ in range(2):
        compile_contexts(bundle, ["net"], RANGES, tmp_path / "out")
    assert len(files(tmp_path / "out")) == 4


def test_attention_taken_apart(bundle, compiler, tmp_path):
    compiler.fails = [RuntimeError("EP_FAIL : Failed to create serialized engine")]
    compile_contexts(bundle, ["net"], RANGES, tmp_path / "out")
    assert [options for *_, options in compiler.asked] == [{}, {"nv_op_types_to_exclude": "Attention"}]
    assert len(files(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        (
            "EP_FAIL : no\n kernel",
            BackendError,
            "TensorRT for RTX cannot compile net: EP_FAIL : no kernel; use --backe",
        ),
        ("CUDA failure 2: out of memory", OutOfMemoryError, "cannot compile net: out of memory"),
    ],
)
def test_a_graph_that_is_refused(bundle, compiler, tmp_path, said, kind, message):
    compiler.fails = [RuntimeError(said)] * 2
    with pytest.raises(kind, match=message):
        compile_contexts(bundle, ["net"], RANGES, tmp_path / "out")
    assert files(tmp_path / "out") == []
    assert not list((tmp_path / "out" / FOLDER).iterdir())


@pytest.mark.parametrize(("nodes", "engines"), [(2, 2), (2, 1), (1, 2)])
def test_a_graph_in_parts(bundle, compiler, tmp_path, nodes, engines):
    compiler.nodes, compiler.engines = nodes, engines
    with pytest.raises(BackendError, match="TensorRT for RTX takes net in 2 parts, not as a whole; use --backend"):
        compile_contexts(bundle, ["net"], RANGES, tmp_path / "out")
    assert files(tmp_path / "out") == []


class TestBeforeAnyWork:
    @pytest.fixture(autouse=True)
    def nothing_is_done(self, compiler: Compiler, tmp_path: Path) -> Any:
        yield
        assert not compiler.asked
        assert not (tmp_path / "out").exists()

    def test_no_gpu(self, bundle, tmp_path, monkeypatch):
        def refuse() -> None:
            raise BackendError("TensorRT for RTX accepts no GPU of this machine")

        monkeypatch.setattr(tensorrt_rtx, "open_device", refuse)
        with pytest.raises(BackendError, match="accepts no GPU of this machine"):
            compile_contexts(bundle, ["net"], RANGES, tmp_path / "out")

    def test_a_later_component_in_float32(self, bundle, tmp_path):
        with pytest.raises(BackendError, match="computes in float32"):
            compile_contexts(bundle, ["net", "plain"], RANGES | {"plain": RANGES["net"]}, tmp_path / "out")

    def test_a_table(self, bundle, tmp_path):
        with pytest.raises(BackendError, match="table is a table of tensors and has no graph to run"):
            compile_contexts(bundle, ["table"], RANGES, tmp_path / "out")

    def test_no_such_component(self, bundle, tmp_path):
        with pytest.raises(BundleError, match="has no component 'nothing'"):
            compile_contexts(bundle, ["nothing"], RANGES, tmp_path / "out")

    def test_a_dynamic_dimension_without_a_range(self, bundle, tmp_path):
        with pytest.raises(UsageError, match="net has the dynamic dimension 'batch', which has no range; give its min"):
            compile_contexts(bundle, ["net"], {"net": ({"tokens": (2, 4, 8)},)}, tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(bundle, compiler, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        compile_contexts(bundle, ["net"], RANGES, tmp_path / "out")


def test_a_folder_that_is_a_file(bundle, compiler, tmp_path):
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(OutputError, match=r"out/engines/.* cannot be written \(.*\); check the path and its rights"):
        compile_contexts(bundle, ["net"], RANGES, tmp_path / "out")
