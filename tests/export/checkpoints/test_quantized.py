"""Quantized files of other tools are decoded to what torch, or the tool's own formula, makes of them."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.export.checkpoints.test_layouts import read, values
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.checkpoints import quantized
from zimgkit.export.checkpoints.checkpoint import read_component
from zimgkit.export.checkpoints.stored import Decoded, tensor_rows

FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
NAME = "layers.0.attention.to_q.weight"
MODULE = "layers.0.attention.to_q"


def text(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).clone()


@pytest.fixture
def weight():
    return torch.randn((6, 512), generator=torch.Generator().manual_seed(0))


def one(found, expected: torch.Tensor, name: str = NAME, exact: bool = True) -> None:
    assert set(found) == {name}
    assert found[name].shape == tuple(expected.shape)
    got = torch.from_numpy(values(found[name], 4).copy())
    if exact:
        assert torch.equal(got, expected.float())
    else:
        torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", FP8)
def test_every_pattern_of_float8(dtype):
    bits = torch.arange(256, dtype=torch.uint8)
    expected = bits.view(FP8[dtype])
    np.testing.assert_array_equal(quantized._to_float32(dtype), expected.float().numpy())
    np.testing.assert_array_equal(
        torch.from_numpy(quantized._to_bfloat16(dtype).copy()).view(torch.bfloat16).float().numpy(),
        expected.float().numpy(),
    )


@pytest.mark.parametrize("dtype", FP8)
def test_plain_float8(weight, tmp_path, dtype):
    stored = weight.to(FP8[dtype])
    one(read(tmp_path / "a.safetensors", "transformer", {NAME: stored}), stored.float())


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1), (3, 1), (2, 4)])
@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale", "weight_scale_inv"])
def test_scaled_float8(weight, tmp_path, suffix, shape):
    stored = weight.to(torch.float8_e4m3fn)
    scale = torch.rand(shape) + 0.5
    wide = scale.reshape(-1, 1) if scale.ndim < 2 else scale
    wide = wide.repeat_interleave(6 // len(wide), 0).repeat_interleave(512 // wide.shape[1], 1)
    beside = {f"{MODULE}.{suffix}": scale, f"{MODULE}.scale_input": torch.ones(1),
              f"{MODULE}.comfy_quant": text({"format": "float8_e4m3fn"}),
              "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}  # fmt: skip
    one(read(tmp_path / "a.safetensors", "transformer", {NAME: stored} | beside), stored.float() * wide)


def test_scaled_float8_in_a_text_encoder(weight, tmp_path):
    stored, name = weight.to(torch.float8_e4m3fn), "layers.1.mlp.up_proj.weight"
    beside = {"model.layers.1.mlp.up_proj.scale_weight": torch.tensor(0.25)}
    found = read(tmp_path / "a.safetensors", "text_encoder", {f"model.{name}": stored} | beside)
    one(found, stored.float() * 0.25, name)


def test_the_rows_of_a_fused_weight_keep_their_scales(weight, tmp_path):
    stored, scale = weight.to(torch.float8_e4m3fn), torch.rand(6, 1) + 0.5
    beside = {"layers.0.attention.qkv.weight_scale": scale}
    found = read(tmp_path / "a.safetensors", "transformer", {"layers.0.attention.qkv.weight": stored} | beside)
    for index, part in enumerate("qkv"):
        expected = (stored.float() * scale)[2 * index : 2 * index + 2]
        np.testing.assert_array_equal(values(found[f"layers.0.attention.to_{part}.weight"]), expected.numpy())


def rotation(size: int) -> torch.Tensor:
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = four
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / size**0.5


@pytest.mark.parametrize("rowwise", [True, False])
@pytest.mark.parametrize("group", [0, 4, 64, 256])
@pytest.mark.parametrize("in_metadata", [True, False])
def test_int8(weight, tmp_path, group, rowwise, in_metadata):
    turned = weight
    if group:
        turned = (weight.reshape(6, -1, group) @ rotation(group).T).reshape(weight.shape)
    scale = turned.abs().amax(dim=1, keepdim=True) / 127 if rowwise else turned.abs().max() / 127
    stored = (turned / scale).round().clamp(-128, 127).to(torch.int8)
    mark = {"format": "int8_tensorwise", "convrot": bool(group), "convrot_groupsize": group or 256}
    tensors, metadata = {NAME: stored, f"{MODULE}.weight_scale": scale.float()}, {}
    if in_metadata:
        metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {MODULE: mark}})}
        tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    else:
        tensors[f"{MODULE}.comfy_quant"] = text(mark)
    found = read(tmp_path / "a.safetensors", "transformer", tensors, **metadata)
    expected = stored.double() * scale.double()
    if group:
        expected = (expected.reshape(6, -1, group) @ rotation(group).double()).reshape(weight.shape)
        assert (expected - weight).abs().max() < 0.05
    one(found, expected.float(), exact=not group)


def test_int8_of_bitsandbytes(weight, tmp_path):
    largest = weight.abs().amax(dim=1)
    stored = (weight / largest[:, None] * 127).round().to(torch.int8)
    beside = {f"{MODULE}.SCB": largest, f"{MODULE}.weight_format": torch.zeros((), dtype=torch.uint8)}
    found = read(tmp_path / "a.safetensors", "transformer", {NAME: stored} | beside)
    one(found, stored.float() * (largest * 7.874015718698502e-3)[:, None], exact=False)


def test_int8_of_quanto(weight, tmp_path):
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    stored = (weight / scale).round().to(torch.int8)
    beside = {
        f"{NAME}._scale": scale,
        f"{MODULE}.input_scale": torch.ones(()),
        f"{MODULE}.output_scale": torch.ones(()),
    }
    one(read(tmp_path / "a.safetensors", "transformer", {f"{NAME}._data": stored} | beside), stored.float() * scale)


NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
       1.0]  # fmt: skip


def nf4(weight: torch.Tensor, nested: bool, size: int = 64) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors that bitsandbytes saves, and what they mean: a value is its code's times the scale of its block."""
    table, blocks = torch.tensor(NF4), weight.reshape(-1, size)
    absmax = blocks.abs().amax(dim=1)
    codes = ((blocks / absmax[:, None]).reshape(-1, 1) - table).abs().argmin(dim=1)
    packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8).reshape(-1, 1)
    state = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": list(weight.shape)}
    tensors = {NAME: packed, f"{NAME}.quant_map": table, f"{NAME}.absmax": absmax}
    if nested:
        offset = float(absmax.mean())
        own_table, group = torch.linspace(-1, 1, 256), 16
        centred = (absmax - offset).reshape(-1, group)
        largest = centred.abs().amax(dim=1)
        small = ((centred / largest[:, None]).reshape(-1, 1) - own_table).abs().argmin(dim=1)
        absmax = own_table[small] * largest.repeat_interleave(group) + offset
        tensors |= {f"{NAME}.absmax": small.to(torch.uint8), f"{NAME}.nested_absmax": largest,
                    f"{NAME}.nested_quant_map": own_table}  # fmt: skip
        state |= {"nested_blocksize": group, "nested_dtype": "float32", "nested_offset": offset}
    tensors[f"{NAME}.quant_state.bitsandbytes__nf4"] = text(state)
    return tensors, (table[codes] * absmax.repeat_interleave(size)).reshape(weight.shape)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(6, 512), (32, 96), (64, 3)])
def test_four_bits_of_bitsandbytes(tmp_path, nested, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    size = 64 if weight.numel() // 64 % 16 == 0 else 12 if nested else 64
    tensors, expected = nf4(weight, nested, size)
    one(read(tmp_path / "a.safetensors", "transformer", tensors), expected, exact=not nested)


def without(suffix):
    return lambda tensors: tensors.pop(NAME + suffix)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


STATE = ".quant_state.bitsandbytes__nf4"
MUTATIONS = [
    (without(".absmax"), "without a readable 'absmax'"),
    (without(".quant_map"), "without a readable 'quant_map'"),
    (without(".nested_absmax"), "without a readable 'nested_absmax'"),
    (put(NAME + ".absmax", torch.zeros(47, dtype=torch.uint8)), "do not fit"),
    (put(NAME + ".quant_map", torch.zeros(15)), "do not fit"),
    (put(NAME + ".nested_quant_map", torch.zeros(255)), "do not fit"),
    (put(NAME + STATE, torch.zeros(80, dtype=torch.uint8)), "no readable"),
    (put(NAME + STATE, text([])), "no readable"),
    (put(NAME + STATE, text({"shape": [2**62, 2**62], "blocksize": 64})), "do not fit"),
    (put(NAME + STATE, text({"shape": [-6, -512], "blocksize": 64})), "do not fit"),
    (put(NAME + STATE, text({"shape": [6, 512], "blocksize": 0})), "do not fit"),
    (put(NAME + STATE, text({"shape": [], "blocksize": 64})), "do not fit"),
    (put(NAME + STATE, torch.full((1 << 17,), ord("["), dtype=torch.uint8)), "no readable"),
]


@pytest.mark.parametrize("change, message", MUTATIONS)
def test_a_broken_quant_state(weight, tmp_path, change, message):
    tensors, _ = nf4(weight, nested=True, size=64)
    change(tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path / "a.safetensors", "transformer", tensors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "beside, message",
    [
        ({"weight_scale": torch.ones(5)}, "do not fit"),
        ({"weight_scale": torch.ones(2, 5)}, "do not fit"),
        ({"weight_scale": torch.ones(0)}, "do not fit"),
        ({"weight_scale": torch.ones(1), "comfy_quant": text({"format": "mxfp8"})}, "is in mxfp8"),
        ({"weight_scale": torch.ones(1), "comfy_quant": text("x" * 9)}, "cannot be read"),
        (
            {"weight_scale": torch.ones(1), "comfy_quant": text({"convrot": True, "convrot_groupsize": 8})},
            "groups of 8",
        ),
        ({"weight_scale": torch.ones(1), "comfy_quant": text({"convrot": True, "convrot_groupsize": 1024})}, "of 1024"),
        ({"weight_scale": torch.ones(1), "weight_scale_2": torch.ones(1)}, "NVFP4"),
        ({"smooth_factor": torch.ones(1)}, "SVDQuant"),
        ({"qzeros": torch.ones(1)}, "GPTQ or AWQ"),
    ],
)
def test_what_is_not_decoded_is_named(tmp_path, beside, message):
    tensors = {NAME: torch.zeros(6, 512, dtype=torch.int8)} | {f"{MODULE}.{k}": v for k, v in beside.items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path / "a.safetensors", "transformer", tensors)
    assert "\n" not in str(caught.value)


def test_few_rows_are_in_memory(tmp_path):
    """Of a large weight, a reader's rows alone are decoded."""
    stored = torch.zeros(1 << 15, 512, dtype=torch.int8)
    save_file({NAME: stored, f"{MODULE}.weight_scale": torch.ones(1 << 15, 1)}, tmp_path / "a.safetensors")
    found = read_component([tmp_path / "a.safetensors"], "transformer")[NAME]
    assert isinstance(found, Decoded) and found.nbytes == 1 << 26
    tracemalloc.start()
    for start in range(0, 1 << 15, 256):
        tensor_rows(found, start, start + 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
