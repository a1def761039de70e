"""The torch backend on whole bundles: against the modules they were exported from, and against ONNX Runtime."""

from __future__ import annotations

import re
import sys
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, nn

from zimgkit.engines import base
from zimgkit.engines.bundle import (
    SCHEMA_VERSION,
    Bundle,
    Component,
    Defaults,
    Manifest,
    Source,
    TensorSpec,
    TextConfig,
    record_files,
    write_manifest,
)
from zimgkit.engines.errors import BackendError, BundleError, OutOfMemoryError, UsageError, install
from zimgkit.engines.tensors import safetensors
from zimgkit.engines.torch import blocks as torch_blocks
from zimgkit.engines.torch import layers as torch_layers
from zimgkit.engines.torch import ops as torch_ops
from zimgkit.engines.torch.engine import open_engine

NAMES = {ir.DataType.FLOAT: "float32", ir.DataType.BFLOAT16: "bfloat16"}


def bundle_of(root: Path, graphs: dict[str, ir.Model], precision: str = "float32") -> Bundle:
    """Write models of one component "net", one per element type, whose larger constants lie in ``net.safetensors``."""
    root.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.const_value.numpy()
        for model in graphs.values()
        for name, value in model.graph.initializers.items()
        if value.const_value.size >= 8 and not isinstance(value.const_value, ir.ExternalTensor)
    }
    stored = {name: NAMES[ir.DataType.from_numpy(array.dtype)] for name, array in weights.items()}
    infos = safetensors.write(
        root / "net.safetensors",
        {name: (stored[name], array.shape) for name, array in weights.items()},
        {name: [array.view(np.uint16) if stored[name] == "bfloat16" else array] for name, array in weights.items()},
    )
    for dtype, model in graphs.items():
        for name, value in model.graph.initializers.items():
            if name in infos:
                info, shape = infos[name], ir.Shape(infos[name].shape)
                kind = value.const_value.dtype
                place = ("net.safetensors", info.offset, info.nbytes)
                value.const_value = ir.ExternalTensor(*place, kind, shape=shape, name=name, base_dir=root)
        ir.save(model, root / f"net.{dtype}.onnx")
    graph = next(iter(graphs.values())).graph
    component = Component(
        weights=("net.safetensors",),
        graphs={dtype: f"net.{dtype}.onnx" for dtype in graphs},
        inputs={value.name: spec(value) for value in graph.inputs},
        outputs={value.name: spec(value) for value in graph.outputs},
    )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        zimgkit_version="0",
        tasks=(),
        family="none",
        name="test",
        precision=precision,
        sources={"checkpoint": Source("test")},
        text=TextConfig("", "", 0, 1, 1),
        defaults=Defaults(1, 1.0, 16, 16),
        scheduler={},
        config={},
        components={"net": component, "table": Component(weights=("net.safetensors",))},
        files=record_files(root),
    )
    write_manifest(root, manifest)
    return Bundle.open(root, verify=False)


def spec(value: ir.Value) -> TensorSpec:
    """Arrays go in and out in float32 whatever the graph computes in."""
    return TensorSpec("float32", tuple(side if isinstance(side, int) else str(side) for side in value.shape))


def exported(module: nn.Module, example: dict[str, Tensor], dynamic: dict[str, dict[int, str]]) -> ir.Model:
    shapes = {
        name: {axis: torch.export.Dim(dim, min=2, max=4000) for axis, dim in dynamic.get(name, {}).items()}
        for name in example
    }
    program = torch.onnx.export(
        module.eval(), kwargs=example, dynamo=True, opset_version=23, dynamic_shapes=shapes, verbose=False
    )
    return program.model


class Block(nn.Module):
    """A modulated transformer block with grouped heads, rotary positions and a gated MLP."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.head = heads, groups, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-5), nn.LayerNorm(width, 1e-6)
        self.q = nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, groups * self.head, bias=False) for _ in range(2))
        self.norm_q, self.norm_k = nn.RMSNorm(self.head, 1e-6), nn.RMSNorm(self.head, 1e-6)
        self.out, self.modulation = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.up, self.gate, self.down = nn.Linear(width, 96), nn.Linear(width, 96), nn.Linear(96, width)

    def forward(self, x: Tensor, temb: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        scale, shift = self.modulation(F.silu(temb)).unsqueeze(1).chunk(2, -1)
        h = self.norm1(x) * (1 + scale) + shift
        q = self.turn(self.norm_q(self.q(h).unflatten(-1, (self.heads, -1))), cos, sin).transpose(1, 2)
        k = self.turn(self.norm_k(self.k(h).unflatten(-1, (self.groups, -1))), cos, sin).transpose(1, 2)
        v = self.v(h).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        h = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.out(h.transpose(1, 2).flatten(2)).tanh()
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * F.gelu(self.up(h), approximate="tanh"))

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos[:, :, None], sin[:, :, None]
        return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(48, 4, 2) for _ in range(2))

    def forward(self, x: Tensor, temb: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, temb, cos, sin)
        return x


def block_inputs(batch: int, tokens: int) -> dict[str, Tensor]:
    angles = torch.rand(batch, tokens, 6)
    return {
        "x": torch.randn(batch, tokens, 48),
        "temb": torch.randn(batch, 48),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }


class Decoder(nn.Module):
    """Convolutions with and without stride, group norms, spatial attention, nearest upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(4, 16, 1e-6)
        self.qkv, self.last = nn.Conv2d(16, 48, 1), nn.Conv2d(16, 3, 3, padding=1)
        self.down, self.depth = nn.Conv2d(16, 16, 3, stride=2), nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, z: Tensor) -> Tensor:
        x = F.silu(self.norm(self.first(z)))
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        x = F.interpolate(x + h.reshape(x.shape), scale_factor=2.0, mode="nearest")
        x = self.down(F.pad(self.depth(x), (0, 1, 0, 1)))
        x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return self.last(x).clamp(-1, 1)


Made = tuple[nn.Module, Bundle]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(0)
    module, tokens = Blocks(), {0: "batch", 1: "tokens"}
    dynamic = {"x": tokens, "temb": {0: "batch"}, "cos": tokens, "sin": tokens}
    model = exported(module, block_inputs(2, 7), dynamic)
    return module, bundle_of(tmp_path_factory.mktemp("blocks"), {"float32": model})


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(1)
    module = Decoder()
    model = exported(module, {"z": torch.randn(1, 4, 6, 8)}, {"z": {2: "h", 3: "w"}})
    return module, bundle_of(tmp_path_factory.mktemp("decoder"), {"float32": model})


def check(made: Made, feeds: dict[str, Tensor], tolerance: float = 3e-6) -> None:
    """The interpreter agrees with the module and with ONNX Runtime."""
    module, bundle = made
    with torch.inference_mode():
        expected = module(**feeds).numpy()
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    engine = open_engine(bundle, "net", "cpu")
    (found,) = engine.run(arrays).values()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)
    session = onnxruntime.InferenceSession(bundle.file("net.float32.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(found, session.run(None, arrays)[0], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("batch", "tokens"), [(2, 2), (2, 33), (3, 128), (2, 1000)])
def test_transformer_blocks(blocks: Made, batch: int, tokens: int) -> None:
    torch.manual_seed(tokens)
    check(blocks, block_inputs(batch, tokens))


@pytest.mark.parametrize(("h", "w"), [(2, 2), (5, 9), (16, 12)])
def test_decoder(decoder: Made, h: int, w: int) -> None:
    torch.manual_seed(h)
    check(decoder, {"z": torch.randn(1, 4, h, w)})


def test_uploaded_inputs_stay_what_they_were(blocks: Made) -> None:
    module, bundle = blocks
    feeds = {name: tensor.numpy() for name, tensor in block_inputs(2, 5).items()}
    expected = module(*map(torch.tensor, feeds.values())).detach().numpy()
    engine = open_engine(bundle, "net", "cpu")
    kept = engine.upload({name: feeds[name] for name in ("cos", "sin", "temb")})
    for name in kept:
        feeds[name][:] = np.nan
    for _ in range(2):
        (found,) = engine.run({**kept, "x": feeds["x"]}).values()
        np.testing.assert_allclose(found, expected, atol=1e-6)


def hand_written(root: Path, dtype: str) -> Bundle:
    """Two calls of a local function, y = gelu(x w^T + b), with weights by name in safetensors."""
    kind = {"float32": TensorProto.FLOAT, "bfloat16": TensorProto.BFLOAT16}[dtype]
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("zimg", 1)]
    body = [
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["s"]),
        helper.make_node("Gelu", ["s"], ["y"]),
    ]
    function = helper.make_function("zimg", "Layer", ["x", "w", "b"], ["y"], body, imports)
    calls = [
        helper.make_node("Layer", ["x", "0.w", "0.b"], ["h"], "layers.0", domain="zimg"),
        helper.make_node("Layer", ["h", "1.w", "1.b"], ["y"], "layers.1", domain="zimg"),
    ]
    rng = np.random.default_rng(3)
    arrays = {f"{k}.{n}": rng.standard_normal((8, 8) if n == "w" else (8,)) for k in range(2) for n in "wb"}
    storage = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    graph = helper.make_graph(
        calls,
        "g",
        [helper.make_tensor_value_info("x", kind, ["n", 8])],
        [helper.make_tensor_value_info("y", kind, ["n", 8])],
        [onnx.numpy_helper.from_array(array.astype(storage), name) for name, array in arrays.items()],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, functions=[function]))
    return bundle_of(root, {dtype: model}, dtype)


def layers(bundle: Bundle, x: np.ndarray, dtype: torch.dtype) -> Tensor:
    """What the hand-written graph means, from the safetensors by name."""
    tensors = {}
    for name, info in bundle.tensors("net").items():
        stored = torch.from_numpy(np.array(safetensors.view(info)))
        tensors[name] = stored.view(getattr(torch, info.dtype))
    y = torch.from_numpy(x).to(dtype)
    for k in range(2):
        y = F.gelu(y @ tensors[f"{k}.w"].t() + tensors[f"{k}.b"])
    return y.float()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_local_functions_and_weights_in_safetensors(tmp_path: Path, dtype: str) -> None:
    bundle = hand_written(tmp_path, dtype)
    x = np.random.default_rng(4).standard_normal((5, 8)).astype(np.float32)
    engine = open_engine(bundle, "net", "cpu")
    np.testing.assert_allclose(engine.run({"x": x})["y"], layers(bundle, x, getattr(torch, dtype)).numpy(), rtol=1e-5)


def two_graphs(root: Path) -> Bundle:
    """bfloat16 weights with a graph in bfloat16 and one in float32 that casts them."""

    def graph(kind: int) -> ir.Model:
        nodes = [helper.make_node("Cast", ["w"], ["c"], to=kind), helper.make_node("Mul", ["x", "c"], ["y"])]
        starts = [helper.make_tensor_value_info("x", kind, ["n", 8])]
        ends = [helper.make_tensor_value_info("y", kind, ["n", 8])]
        weight = helper.make_tensor("w", TensorProto.BFLOAT16, [8], [1 + k / 128 for k in range(8)])
        proto = helper.make_graph(nodes, "g", starts, ends, [weight])
        return ir.from_proto(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 23)]))

    return bundle_of(root, {"bfloat16": graph(TensorProto.BFLOAT16), "float32": graph(TensorProto.FLOAT)}, "bfloat16")


@pytest.mark.parametrize("multiplies", [False, True])
def test_the_cpu_computes_in_bfloat16_where_it_multiplies_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, multiplies: bool
) -> None:
    monkeypatch.setattr(torch_layers, "PRODUCTS_IN_BFLOAT16", multiplies)
    bundle = two_graphs(tmp_path)
    x = np.full((1, 8), 1.001, np.float32)
    weight = np.array([[1 + k / 128 for k in range(8)]], np.float32)
    exact = open_engine(bundle, "net", "cpu", "float32")
    np.testing.assert_array_equal(exact.run({"x": x})["y"], x * weight)
    found = open_engine(bundle, "net", "cpu").run({"x": x})["y"]
    np.testing.assert_array_equal(found, weight if multiplies else x * weight)


def test_another_device_computes_in_the_bundles_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such device here: the meta device takes the graph and the weights, and shows their types."""
    import zimgkit.engines.torch.engine as module

    compiled = []
    original = module.compile_graph
    monkeypatch.setattr(module, "compile_graph", lambda *given: compiled.append(original(*given)) or compiled[-1])
    open_engine(two_graphs(tmp_path), "net", "meta")
    assert compiled[0].dtypes == {"x": torch.bfloat16}
    assert {value.device.type for value in compiled[0].slots if value is not None} == {"meta"}


def test_weights_are_mapped_not_read(tmp_path: Path) -> None:
    """Proof that no copy was made: what is changed in the file changes the result."""
    bundle = hand_written(tmp_path, "float32")
    x = np.random.default_rng(5).standard_normal((2, 8)).astype(np.float32)
    engine = open_engine(bundle, "net", "cpu")
    before = engine.run({"x": x})["y"]
    with bundle.file("net.safetensors").open("r+b") as file:
        file.seek(bundle.tensors("net")["1.b"].offset)
        file.write(np.full(8, 9, np.float32).tobytes())
    after = engine.run({"x": x})["y"]
    assert not np.allclose(before, after)
    np.testing.assert_allclose(after, layers(bundle, x, torch.float32).numpy(), rtol=1e-5)


def test_weights_at_odd_offsets(tmp_path: Path) -> None:
    """Other writers of safetensors need not align their tensors."""
    bundle = hand_written(tmp_path, "float32")
    x = np.random.default_rng(6).standard_normal((2, 8)).astype(np.float32)
    expected = open_engine(bundle, "net", "cpu").run({"x": x})["y"]
    path = bundle.file("net.safetensors")
    path.write_bytes(b"\0" * 3 + path.read_bytes())
    model = ir.load(bundle.file("net.float32.onnx"))
    for value in model.graph.initializers.values():
        old = value.const_value
        place = (old.location, old.offset + 3, old.length, old.dtype)
        value.const_value = ir.ExternalTensor(*place, shape=old.shape, name=old.name, base_dir=tmp_path)
    ir.save(model, tmp_path / "net.float32.onnx")
    np.testing.assert_array_equal(open_engine(bundle, "net", "cpu").run({"x": x})["y"], expected)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "net needs the input 'x'"),
        ({"y": np.zeros((2, 5, 48), np.float32)}, "net has no input 'y'; it has x, temb, cos, sin"),
        ({"x": np.zeros((5, 48), np.float32)}, r"net takes 'x' in the shape .*, not \(5, 48\)"),
        ({"x": np.zeros((2, 5, 47), np.float32)}, r"net takes 'x' in the shape .*, not \(2, 5, 47\)"),
        ({"sin": np.zeros((2, 4, 6), np.float32)}, "net got 'sin' of 4 tokens, and another input of 5"),
        ({"x": np.zeros((2, 5, 48), np.int64)}, "net takes 'x' in float32, not int64"),
    ],
)
def test_wrong_inputs(blocks: Made, change: dict[str, np.ndarray | None], message: str) -> None:
    feeds = {name: tensor.numpy() for name, tensor in block_inputs(2, 5).items()}
    given = {name: array for name, array in (feeds | change).items() if array is not None}
    with pytest.raises(BackendError, match=message):
        open_engine(blocks[1], "net", "cpu").run(given)


def test_a_closed_engine_does_not_run(blocks: Made) -> None:
    engine = open_engine(blocks[1], "net", "cpu")
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match="the engine of net is closed; open it again"):
        engine.run({name: tensor.numpy() for name, tensor in block_inputs(2, 5).items()})


@pytest.mark.parametrize(
    ("component", "device", "kind", "message"),
    [
        ("table", "cpu", BackendError, "'table' is a table of tensors"),
        ("lost", "cpu", BundleError, "no component 'lost'"),
        ("net", "toaster", UsageError, "torch knows no device 'toaster'"),
        ("net", "cuda:9", BackendError, "device cuda:9 is not there"),
    ],
)
def test_wrong_component_or_device(
    blocks: Made, component: str, device: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        open_engine(blocks[1], component, device)


@pytest.mark.parametrize("content", [b"", b"\x0a\x7f half a graph"])
def test_a_broken_graph(tmp_path: Path, content: bytes) -> None:
    bundle = hand_written(tmp_path, "float32")
    bundle.file("net.float32.onnx").write_bytes(content)
    with pytest.raises((BundleError, BackendError), match=r"net\.float32\.onnx is"):
        open_engine(bundle, "net", "cpu")


@pytest.mark.parametrize(
    ("location", "offset", "length", "message"),
    [
        ("../secret", 0, 256, "leads out of the bundle"),
        ("/etc/passwd", 0, 256, "leads out of the bundle"),
        ("unlisted.bin", 0, 256, "does not list 'unlisted.bin'"),
        ("net.safetensors", 10**6, 256, "'0.w' does not lie in"),
        ("net.safetensors", -8, 256, "build the bundle again"),
        ("net.safetensors", 0, 200, "'0.w' does not lie in"),
    ],
)
def test_weights_outside_the_bundle(tmp_path: Path, location: str, offset: int, length: int, message: str) -> None:
    bundle = hand_written(tmp_path / "bundle", "float32")
    for path in (tmp_path / "secret", tmp_path / "bundle" / "unlisted.bin"):
        path.write_bytes(bytes(1000))
    path = bundle.file("net.float32.onnx")
    model = onnx.load(path, load_external_data=False)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "0.w")
    for entry in weight.external_data:
        entry.value = str({"location": location, "offset": offset, "length": length}[entry.key])
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=message):
        open_engine(bundle, "net", "cpu")


def test_an_old_opset(tmp_path: Path) -> None:
    bundle = hand_written(tmp_path, "float32")
    model = onnx.load(bundle.file("net.float32.onnx"), load_external_data=False)
    model.opset_import[0].version = 17
    bundle.file("net.float32.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BackendError, match="is in opset 17, and the torch backend reads 21 to 23"):
        open_engine(bundle, "net", "cpu")


def test_an_operator_that_is_not_covered_is_named_at_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = hand_written(tmp_path, "float32")
    monkeypatch.delitem(torch_ops.OPS, "Gelu")
    with pytest.raises(BackendError, match="does not cover the operator Gelu; run it with --backend onnxruntime"):
        open_engine(bundle, "net", "cpu")


OUT_OF_MEMORY = "cpu ran out of memory running 'net'; make a smaller picture"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError, OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), OutOfMemoryError, OUT_OF_MEMORY),
        (RuntimeError("std::bad_alloc"), OutOfMemoryError, OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), OutOfMemoryError, OUT_OF_MEMORY),
        (MemoryError(), OutOfMemoryError, OUT_OF_MEMORY),
        (RuntimeError("no such kernel\nmore"), BackendError, "torch failed running 'net' in Gelu .*: no such kernel$"),
    ],
)
def test_failures_while_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[BackendError], message: str
) -> None:
    def fail(x: Tensor) -> Tensor:
        raise error

    monkeypatch.setitem(torch_ops.OPS, "Gelu", fail)
    engine = open_engine(hand_written(tmp_path, "float32"), "net", "cpu")
    with pytest.raises(kind, match=message):
        engine.run({"x": np.zeros((2, 8), np.float32)})


def test_a_compiler_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: nn.Module) -> nn.Module:
        raise RuntimeError("No working C++ compiler found\nmore")

    monkeypatch.setattr(torch_blocks, "compile_block", fail)
    engine = base.open_engine(hand_written(tmp_path, "float32"), "net", "torch-compiled", "cpu")
    message = r"torch failed running 'net': No working C\+\+ compiler found; use --backend torch, which needs none$"
    with pytest.raises(BackendError, match=message):
        engine.run({"x": np.zeros((2, 8), np.float32)})


def test_what_filled_the_memory_is_free_while_the_error_is_handled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever closes other engines and runs again does so with the error at hand."""
    seen: list[weakref.ref[Tensor]] = []

    def fail(x: Tensor) -> Tensor:
        large = x + 1
        seen.extend([weakref.ref(x), weakref.ref(large)])
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setitem(torch_ops.OPS, "Gelu", fail)
    engine = open_engine(hand_written(tmp_path, "float32"), "net", "cpu")
    with pytest.raises(OutOfMemoryError) as caught:
        engine.run({"x": np.zeros((2, 8), np.float32)})
    assert caught.value
    assert [ref() for ref in seen] == [None, None]


@pytest.mark.parametrize("package", ["torch", "onnx_ir"])
def test_a_missing_package(blocks: Made, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("zimgkit.engines.torch.engine", "zimgkit.engines.torch.graph"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(BackendError, match=rf"needs {package}; {re.escape(install('torch'))}"):
        base.open_engine(blocks[1], "net", "torch")


def test_an_upload_under_a_wrong_name_is_found_when_it_is_used(blocks: Made) -> None:
    engine = open_engine(blocks[1], "net", "cpu")
    kept = engine.upload({"z": np.zeros(3, np.float32)})
    feeds = {name: tensor.numpy() for name, tensor in block_inputs(2, 5).items()}
    with pytest.raises(BackendError, match="net has no input 'z'"):
        engine.run({**feeds, **kept})
