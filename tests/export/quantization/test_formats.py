"""Scales and rounded values against torch's own quantization, and plain algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, numpy_helper

from zimgkit.engines.tensors.dtypes import bfloat16_to_float32
from zimgkit.export.quantization.formats import (
    FLOAT8,
    INT4,
    INT8,
    SCHEMES,
    block_size,
    encode,
    fits,
    round_up,
    stored_scales,
    weight_scales,
)

SHAPES = [(1, 16), (7, 32), (33, 128), (5, 384)]
FORMATS = {"int8": INT8, "float8": FLOAT8, "int4": INT4}


def weights(shape: tuple[int, int], seed: int, spread: float = 1.0) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[0])[:, None] * spread
    return values.numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_scales_let_the_largest_just_fit(name, shape, seed):
    values, number_format = weights(shape, seed), FORMATS[name]
    scales = weight_scales(values, number_format)
    absmax = np.abs(values).reshape(*scales.shape, -1).max(-1)
    ideal = torch.from_numpy(absmax) / number_format.largest
    assert torch.equal(torch.from_numpy(scales), torch.from_numpy(scales).bfloat16().float())  # bfloat16 numbers
    assert (scales >= ideal.numpy()).all() and (scales <= ideal.numpy() * (1 + 2**-7)).all()
    assert np.array_equal(bfloat16_to_float32(stored_scales(scales)), scales)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_torchs(shape, seed):
    values = weights(shape, seed)
    scales = weight_scales(values, INT8)
    zeros = torch.zeros(shape[0], dtype=torch.int64)
    expected = torch.quantize_per_channel(
        torch.from_numpy(values), torch.from_numpy(scales).double(), zeros, 0, torch.qint8
    ).int_repr()
    found = encode(values, scales, INT8)
    assert found.dtype == np.int8
    # Torch multiplies by the reciprocal: a tie may fall to the other side.
    assert np.abs(found.astype(int) - expected.numpy()).max() <= 1
    assert (found != expected.numpy()).mean() < 1e-2
    assert np.abs(found).max() == 127 or np.abs(found).max() == 126
    assert (np.abs(INT8.widen(found) * scales[:, None] - values) <= scales[:, None] / 2 * 1.001).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_float8_is_torchs(shape, seed):
    values = weights(shape, seed)
    scales = weight_scales(values, FLOAT8)
    expected = (torch.from_numpy(values) / torch.from_numpy(scales)[:, None]).to(torch.float8_e4m3fn)
    found = encode(values, scales, FLOAT8)
    assert np.array_equal(found, expected.view(torch.uint8).numpy())
    assert np.array_equal(FLOAT8.widen(found), expected.float().numpy())


@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_packed_as_onnx_has_it(shape):
    values = weights(shape, 1)
    scales = weight_scales(values, INT4)
    block = block_size(shape[1])
    assert scales.shape == (shape[0], shape[1] // block)
    spread = np.repeat(scales, block, axis=1)
    expected = np.clip(np.rint(values / spread), -7, 7)
    found = encode(values, scales, INT4)
    assert found.dtype == np.uint8 and found.shape == (shape[0], shape[1] // 2)
    proto = TensorProto(data_type=TensorProto.INT4, dims=shape, raw_data=found.tobytes())
    assert np.array_equal(numpy_helper.to_array(proto).astype(np.float32), expected)
    assert np.array_equal(INT4.widen(found), expected)
    assert (np.abs(expected * spread - values) <= spread / 2 * 1.001).all()


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_zeros_stay_zero(name):
    values, number_format = np.zeros((3, 32), np.float32), FORMATS[name]
    values[1] = 1e-38  # Far below what a scale divides well.
    scales = weight_scales(values, number_format)
    assert np.isfinite(scales).all() and (scales > 0).all()
    back = number_format.widen(encode(values, scales, number_format))
    assert np.isfinite(back).all() and not back[0].any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("huge", [1e4, 1e30, 3.3e38])
def test_a_huge_value_keeps_its_own(name, huge):
    """What is beside it in a row, or in a block, is rounded to zero; what is in others is as without it."""
    values, number_format = weights((4, 256), 0), FORMATS[name]
    values[1, 3] = -huge
    scales = weight_scales(values, number_format)
    back = number_format.widen(encode(values, scales, number_format)).reshape(*scales.shape, -1) * scales[..., None]
    assert fits(scales, number_format) and np.isfinite(back).all()
    assert back.reshape(values.shape)[1, 3] == pytest.approx(-huge, rel=1 / number_format.largest + 2**-7)
    plain = weights((4, 256), 0)
    alone = weight_scales(plain, number_format)
    expected = number_format.widen(encode(plain, alone, number_format)).reshape(values.shape)
    found = number_format.widen(encode(values, scales, number_format)).reshape(values.shape)
    assert np.array_equal(found[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [3.39e38, np.inf, np.nan])
def test_what_has_no_scale(name, bad):
    values = weights((4, 256), 0)
    values[2, 5] = bad
    assert not fits(weight_scales(values, FORMATS[name]), FORMATS[name])
    assert fits(weight_scales(values[[0, 1, 3]], FORMATS[name]), FORMATS[name])


@pytest.mark.parametrize("bad", [np.nan, np.inf, np.uint32(0xFFFFFFFF).view(np.float32)])
def test_what_is_no_number_shows_in_the_scale(bad):
    values = weights((4, 32), 0)
    values[2, 5] = bad
    assert np.flatnonzero(~np.isfinite(weight_scales(values, INT8))).tolist() == [2]


def test_round_up():
    values = torch.logspace(-20, 20, 999).numpy()
    up = torch.from_numpy(round_up(values))
    assert torch.equal(up, up.bfloat16().float())
    assert (up.numpy() >= values).all()
    below = (up.bfloat16().view(torch.int16) - 1).view(torch.bfloat16).float().numpy()
    assert (below < values).all()
    exact = torch.tensor([0.5, 1.0, 1.5, 448.0]).numpy()
    assert np.array_equal(round_up(exact), exact)


@pytest.mark.parametrize(("width", "block"), [(3840, 128), (192, 64), (96, 32), (48, 16), (24, None), (7, None)])
def test_blocks_divide_rows(width, block):
    assert block_size(width) == block


def test_what_the_command_offers():
    from zimgkit.export.cli.options import CALIBRATED, QUANTIZED

    assert set(QUANTIZED) == set(SCHEMES)
    assert {name for name, scheme in SCHEMES.items() if scheme.activations} == set(CALIBRATED)
