"""GGUF files, written by llama.cpp's own package: values against its own, names against its map, and damage."""

from __future__ import annotations

import shutil
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import mutations
from zimgkit.engines.errors import CheckpointError, ZimgError
from zimgkit.engines.tensors.dtypes import to_float32
from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.export.checkpoints.gguf import read_gguf
from zimgkit.export.checkpoints.layouts import arrange
from zimgkit.export.checkpoints.stored import row_count, tensor_rows
from zimgkit.export.checkpoints.weight_files import weight_files
from zimgkit.export.weights.stream import Wanted, linkable

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
ORIGINAL = {
    "to_q": "qkv",
    "to_out.0": "out",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1": "final_layer",
}
TYPES = [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits]


def write(path: Path, tensors: dict[str, np.ndarray], arch: str = "lumina2", **quantized) -> Path:
    """A GGUF file; ``quantized`` says which tensors are stored in which type, as bytes of blocks that are given."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(40)])
    for name, value in tensors.items():
        writer.add_tensor(name, value, raw_dtype=quantized.get(name.replace(".", "_")))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(kind: gguf.GGMLQuantizationType, rows: int, row_blocks: int, seed: int = 0) -> np.ndarray:
    """Random blocks: every byte is a valid one but for scales, which are finite wherever they lie."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    return np.random.default_rng(seed).integers(0, 60, (rows, row_blocks * size), dtype=np.uint8)


def whole(tensor) -> np.ndarray:
    return to_float32(tensor_rows(tensor, 0, row_count(tensor.shape)), tensor.dtype).reshape(tensor.shape)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_is_what_the_package_makes_of_it(kind, tmp_path):
    width = 512
    stored = blocks(kind, 6, width // gguf.GGML_QUANT_SIZES[kind][0])
    file = write(tmp_path / "a.gguf", {"first": np.ones(8, np.float32), "x": stored}, x=kind)
    tensor = read_gguf(file)["x"]
    expected = gguf.quants.dequantize(stored, kind)
    assert tensor.shape == (6, width)
    np.testing.assert_array_equal(whole(tensor), expected)
    np.testing.assert_array_equal(to_float32(tensor_rows(tensor, 2, 5), tensor.dtype), expected[2:5])


def test_shapes_that_blocks_do_not_fit(tmp_path):
    kind = gguf.GGMLQuantizationType.Q4_K
    stored = blocks(kind, 3, 1)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "pig")
    writer.add_array("comfy.gguf.orig_shape.x", [8, 96])
    writer.add_tensor("x", stored, raw_dtype=kind)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    tensor = read_gguf(tmp_path / "a.gguf")["x"]
    expected = gguf.quants.dequantize(stored, kind).reshape(8, 96)
    assert tensor.shape == (8, 96)
    for start, stop in ((0, 8), (1, 3), (7, 8)):
        np.testing.assert_array_equal(tensor_rows(tensor, start, stop), expected[start:stop])


@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_a_text_encoder_in_llama_cpp_names(family, checkpoint_of, tmp_path):
    (own,) = (checkpoint_of(family) / "text_encoder").glob("*.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3 if family == "z-image" else gguf.MODEL_ARCH.QWEN2VL, 40)
    tensors = {name.replace("model.language_model.", "model."): value for name, value in load_file(own).items()}
    tensors = {
        name if name.startswith(("model.", "lm_")) else f"model.{name}": value for name, value in tensors.items()
    }
    tensors = {name: value.astype(np.float32) for name, value in tensors.items() if "visual" not in name}
    renamed = {names.get_name(name, (".weight", ".bias")): value for name, value in tensors.items()}
    assert None not in renamed
    found = arrange("text_encoder", read_gguf(write(tmp_path / "a.gguf", renamed)))
    assert found.keys() == {name.removeprefix("model.") for name in tensors}
    for name, value in tensors.items():
        np.testing.assert_array_equal(whole(found[name.removeprefix("model.")]), value)


def test_a_vision_tower_in_llama_cpp_names(tmp_path):
    rng = np.random.default_rng(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 4)
    kernel = rng.normal(size=(8, 3, 2, 14, 14)).astype(np.float32)
    qkv = rng.normal(size=(24, 8)).astype(np.float32)
    bias = rng.normal(size=24).astype(np.float32)
    plain = ("attn.proj.weight", "norm1.weight", "norm2.weight", "mlp.gate_proj.bias", "mlp.down_proj.weight")
    tensors = {f"visual.blocks.1.{name}": rng.normal(size=(8, 8)).astype(np.float32) for name in plain}
    tensors |= {
        f"visual.merger.{name}.weight": rng.normal(size=8).astype(np.float32) for name in ("ln_q", "mlp.0", "mlp.2")
    }
    renamed = {names.get_name(name, (".weight", ".bias")): value for name, value in tensors.items()}
    assert None not in renamed
    # As llama.cpp's converter cuts them.
    for key, weight, added in zip("qkv", np.split(qkv, 3), np.split(bias, 3), strict=True):
        renamed |= {f"v.blk.1.attn_{key}.weight": weight, f"v.blk.1.attn_{key}.bias": added}
    renamed |= {"v.patch_embd.weight": kernel[:, :, 0].copy(), "v.patch_embd.weight.1": kernel[:, :, 1].copy()}
    expected = tensors | {
        "visual.blocks.1.attn.qkv.weight": qkv,
        "visual.blocks.1.attn.qkv.bias": bias,
        "visual.patch_embed.proj.weight": kernel,
    }
    found = arrange("text_encoder", read_gguf(write(tmp_path / "mmproj.gguf", renamed, "clip")))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(whole(found[name]), value)
    np.testing.assert_array_equal(tensor_rows(found["visual.blocks.1.attn.qkv.weight"], 6, 19), qkv[6:19])


def test_a_folder_with_a_gguf_transformer(checkpoint_of, tmp_path):
    """Q8_0 of linears whose rows blocks fill, bfloat16 of all others, in original names with q, k and v in one."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_of("z-image"), folder)
    (own,) = (folder / "transformer").glob("*.safetensors")
    tensors, kind = load_file(own), gguf.GGMLQuantizationType.Q8_0
    expected, written, types = dict(tensors), {}, {}
    for name, value in tensors.items():
        if ".to_k." in name or ".to_v." in name:
            continue
        names = [name.replace("to_q", key) for key in ("to_q", "to_k", "to_v")] if ".to_q." in name else [name]
        joined, new = np.concatenate([tensors[key] for key in names]) if len(names) > 1 else value, name
        for old, other in ORIGINAL.items():
            new = new.replace(old, other)
        written[new] = joined
        if joined.ndim == 2 and joined.shape[1] % 32 == 0:
            written[new], types[new.replace(".", "_")] = gguf.quants.quantize(joined, kind), kind
            parts = np.split(gguf.quants.dequantize(written[new], kind), len(names))
            expected |= dict(zip(names, parts, strict=True))
    own.unlink()
    write(folder / "transformer" / "model-Q8_0.gguf", written, **types)
    assert len(types) > 5
    found = open_checkpoint(str(folder)).tensors("transformer")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(whole(found[name]), value, name)
    # No file of a bundle is one in another format.
    assert linkable({"denoiser": {name: Wanted(one, one.shape) for name, one in found.items()}}, "float32") == {
        folder / "transformer" / "model-Q8_0.gguf": False
    }


def test_a_vision_tower_lies_beside_its_language_model(tmp_path):
    for name in ("Qwen-Q8_0.gguf", "mmproj-F16.gguf"):
        (tmp_path / name).touch()
    assert sorted(path.name for path in weight_files(tmp_path, "model")) == ["Qwen-Q8_0.gguf", "mmproj-F16.gguf"]
    (tmp_path / "Qwen-Q4_0.gguf").touch()
    with pytest.raises(CheckpointError, match="several weight files"):
        weight_files(tmp_path, "model")


def counted(tensors: int = 0, values: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + rest


def entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    text = name.encode()
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(text)) + text + sizes + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (counted(1 << 60), "1,152,921,504,606,846,976 tensors, for which it is too short"),
        (counted(0, 1 << 60), "values, for which it is too short"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "has version 1"),
        (b"GGUF", "ends within its header"),
        (counted(0, 1, struct.pack("<Q", 1 << 60) + bytes(20)), "bytes of text, for which it is too short"),
        (counted(0, 1, struct.pack("<Q2sIIQ", 2, b"ab", 9, 4, 1 << 61)), "numbers, for which it is too short"),
        (counted(0, 1, struct.pack("<Q2sI", 2, b"ab", 9) + struct.pack("<IQ", 9, 1) * 9), "has a value of type 9"),
        (counted(1, 0, entry("x", (256,), 77, 0)), "'x' in type 77, which cannot be multiplied out"),
        (counted(1, 0, entry("x", (256,), 9, 0)), "'x' as Q8_1, which cannot be multiplied out"),
        (counted(1, 0, entry("x", (1 << 62, 4), 0, 0)), "'x' ends at"),
        (counted(1, 0, entry("x", (33,), 8, 0) + bytes(99)), "blocks of 32 (Q8_0) do not fill"),
        (counted(1, 0, entry("x", (1,) * 4, 0, 0)[:-12] + bytes(9)), "ends within its header"),
        (counted(2, 0, entry("x", (8,), 0, 0) + entry("y", (8,), 0, 16) + bytes(200)), "'y' lies in 'x'"),
        (counted(2, 0, entry("x", (8,), 0, 0) + entry("x", (8,), 0, 32) + bytes(200)), "has two tensors 'x'"),
        (counted(1, 0, entry("x", (8,), 0, 0) + bytes(10)), "it is cut short: fetch the file again"),
    ],
)
def test_what_is_broken_is_told_in_one_line(data, message, tmp_path):
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_gguf(tmp_path / "a.gguf")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_damage_takes_neither_time_nor_memory(tmp_path):
    kind = gguf.GGMLQuantizationType.Q4_0
    file = write(tmp_path / "a.gguf", {"x": blocks(kind, 4, 4), "y": np.ones((4, 8), np.float32)}, x=kind)
    data = file.read_bytes()
    tracemalloc.start()
    started = time.process_time()
    for _, damaged in mutations.of_bytes(data, 3, 60):
        file.write_bytes(damaged)
        try:
            for tensor in read_gguf(file).values():
                if tensor.nbytes < 1 << 20:
                    tensor_rows(tensor, 0, row_count(tensor.shape))
        except (ZimgError, OSError):
            pass
    assert time.process_time() - started < 10
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
