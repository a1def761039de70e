"""``--precision keep``: a quantized file's own integers in the bundle, held to the bundle of its decoded values."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import quantized
from tests.export.checkpoints.test_gguf import write
from tests.export.lora import lora_files
from tests.export.lora.swapping import contents, swap
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import UsageError
from zimgkit.engines.tensors.dtypes import to_float32
from zimgkit.export.build import build
from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.export.checkpoints.stored import row_count, tensor_rows
from zimgkit.export.quality.verify import verify
from zimgkit.export.quantization.quantized_weights import dequantized

pytestmark = pytest.mark.usefixtures("torch_in_float32")

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
FAMILY = "z-image"
COMPONENT = "denoiser"
PATTERN = (".attention.to_", ".feed_forward.")


def int8(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    """The linears of blocks in int8, those of even rank with a scale for each row and the others with one."""
    found: dict[str, torch.Tensor] = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        found[name] = tensor.bfloat16()
        if tensor.ndim == 2 and any(part in name for part in PATTERN):
            wide = tensor.float()
            scale = (wide.abs().amax(1, keepdim=True) if index % 2 else wide.abs().max()) / 127
            found[name] = (wide / scale).round().to(torch.int8)
            found[name.removesuffix("weight") + "weight_scale"] = scale
    save_file(found, path)
    return path


def in_gguf(kind: str, tensors: dict[str, torch.Tensor], path: Path) -> Path:
    """Likewise in a type of GGUF's."""
    own, found = gguf.GGMLQuantizationType[kind], {}
    kinds = {}
    for name, tensor in tensors.items():
        found[name] = tensor.bfloat16().float().numpy()
        if tensor.ndim == 2 and any(part in name for part in PATTERN) and tensor.shape[1] % 32 == 0:
            found[name] = gguf.quants.quantize(found[name], own)
            kinds[name.replace(".", "_")] = own
    return write(path, found, **kinds)


@pytest.fixture(scope="module")
def tensors(checkpoint_of):
    return load_file(next((checkpoint_of(FAMILY) / "transformer").glob("*.safetensors")))


@pytest.fixture(scope="module")
def files(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        "int8": int8(tensors, folder / "int8.safetensors"),
        **{kind: in_gguf(kind, tensors, folder / f"{kind}.gguf") for kind in ("Q4_0", "Q8_0", "Q4_1")},
    }


def built(checkpoint_of, file: Path, out: Path, precision: str = "keep", **options) -> tuple[Bundle, list[str]]:
    said: list[str] = []
    options.setdefault("files", {"transformer": file})
    return build(str(checkpoint_of(FAMILY)), out, precision=precision, say=said.append, **options), said


@pytest.fixture(scope="module")
def kept(checkpoint_of, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    made: dict[str, tuple[Bundle, list[str]]] = {}

    def make(kind: str) -> tuple[Bundle, list[str]]:
        if kind not in made:
            made[kind] = built(checkpoint_of, files[kind], folder / kind)
        return made[kind]

    return make


@pytest.mark.parametrize(("kind", "precision"), [("int8", "int8-weights"), ("Q4_0", "int4-weights")])
def test_values_are_those_of_the_file(kind, precision, kept, files, checkpoint_of, tmp_path):
    bundle, said = kept(kind)
    quantization = bundle.manifest.quantization
    assert quantization.precision == precision
    assert said and precision in said[0]
    own = open_checkpoint(str(checkpoint_of(FAMILY)), files={"transformer": files[kind]}).tensors("transformer")
    names = [name.removesuffix(".scale") for name in bundle.tensors(COMPONENT) if name.endswith(".scale")]
    assert len(names) == quantization.kept[COMPONENT].exact >= 3
    assert quantization.kept[COMPONENT].rounded == 0
    assert not any(name in quantization.unquantized[COMPONENT] for name in names)
    for name in names:
        shape, rows = dequantized(bundle, COMPONENT, name)
        expected = to_float32(tensor_rows(own[name], 0, row_count(own[name].shape)), own[name].dtype)
        found = np.concatenate([*rows])
        assert found.shape == shape == own[name].shape
        np.testing.assert_array_equal(found, expected)
    # What is no linear of a block is in no integers in the file, and in none here.
    assert {"bfloat16 in the file", "float32 in the file"} & {*quantization.unquantized[COMPONENT].values()}
    # The graph that computes in float32 multiplies by the very same numbers as that of their bundle in float32.
    floats, _ = built(checkpoint_of, files[kind], tmp_path / "floats", "fp32")
    runs = quantized.record(floats.root, COMPONENT)
    for (_, expected), found in zip(runs, quantized.replay(bundle.root, COMPONENT, "torch", runs), strict=True):
        assert quantized.relative(found, expected) < 1e-6
    for (_, expected), found in zip(runs, quantized.replay(bundle.root, COMPONENT, "onnxruntime", runs), strict=True):
        assert quantized.relative(found, expected) < (1e-4 if kind == "int8" else 0.01)
    copy = Bundle.open(shutil.copytree(bundle.root, tmp_path / "copy"))
    for name in copy.component(COMPONENT).graphs.values():
        onnx.checker.check_model(copy.file(name), full_check=True)
    report = verify(bundle.root, str(checkpoint_of(FAMILY)))
    assert report["passed"], report


@pytest.mark.parametrize("kind", ["int8", "Q4_0"])
def test_loras_come_and_go(kind, kept, tensors, checkpoint_of, files, tmp_path):
    bundle, _ = kept(kind)
    before, own = contents(bundle.root), tmp_path / "bundle"
    pairs = lora_files.pairs(lora_files.modules(tensors, ["attention.to_q", "feed_forward.w2"]))
    lora = lora_files.write(tmp_path / "lora.safetensors", lora_files.lightx2v(pairs))
    merged = swap(bundle.root, lora, out=own).bundle
    assert verify(own, str(checkpoint_of(FAMILY)))["passed"]
    changed = {name for name, data in contents(own).items() if data != before[name]}
    assert changed and all(name.partition(".weight")[0] in pairs for _, name in changed)
    whole, _ = built(checkpoint_of, files[kind], tmp_path / "whole", loras=[str(lora)])
    assert contents(whole.root) == contents(own)
    assert whole.manifest.quantization.kept[COMPONENT].rounded > 0
    assert merged.manifest.loras == whole.manifest.loras
    swap(own)
    assert contents(own) == before
    swap(whole.root)
    assert contents(whole.root) == before


def test_rounding_twice_is_measured(kept, files, checkpoint_of, tmp_path):
    bundle, said = kept("Q8_0")
    assert "Q8_0" in said[0] and bundle.manifest.quantization.precision == "int8-weights"
    entry = bundle.manifest.quantization.kept[COMPONENT]
    assert entry.exact == 0 and entry.rounded >= 3
    own = open_checkpoint(str(checkpoint_of(FAMILY)), files={"transformer": files["Q8_0"]}).tensors("transformer")
    error = norm = 0.0
    for name in (name.removesuffix(".scale") for name in bundle.tensors(COMPONENT) if name.endswith(".scale")):
        values = to_float32(tensor_rows(own[name], 0, own[name].shape[0]), own[name].dtype).astype(float)
        error += ((np.concatenate([*dequantized(bundle, COMPONENT, name)[1]]) - values) ** 2).sum()
        norm += (values**2).sum()
    assert 0 < entry.error == pytest.approx((error / norm) ** 0.5, rel=1e-4)


def test_what_no_precision_keeps(files, checkpoint_of, tmp_path):
    with pytest.raises(UsageError, match="is in Q4_1, which no precision keeps"):
        built(checkpoint_of, files["Q4_1"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "bfloat16")]
)
def test_floats(tensors, checkpoint_of, tmp_path, dtype, precision):
    parts = {}
    for component in ("transformer", "text_encoder"):
        stored = load_file(next((checkpoint_of(FAMILY) / component).glob("*.safetensors")))
        parts[component] = tmp_path / f"{component}.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in stored.items()}, parts[component])
    bundle, said = built(checkpoint_of, parts["transformer"], tmp_path / "out", files=parts)
    assert (bundle.manifest.precision, bundle.manifest.quantization) == (precision, None)
    assert ("three more bits" in said[0]) == (dtype == torch.float16)
