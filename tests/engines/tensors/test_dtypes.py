"""Element types against torch, ml_dtypes, onnx and safetensors."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import _TYPES

from zimgkit.engines.tensors import dtypes
from zimgkit.engines.tensors.dtypes import DTYPES, bfloat16_to_float32, float32_to_bfloat16, round_to, to_float32

PATTERNS = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def torch_bits(values: np.ndarray) -> np.ndarray:
    """What torch rounds float32 to, as 16-bit patterns."""
    return torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)


def assert_same_rounding(values: np.ndarray) -> None:
    ours, theirs = float32_to_bfloat16(values), torch_bits(values)
    assert ours.dtype == np.uint16
    assert ours.shape == values.shape
    nan = np.isnan(values)
    assert np.array_equal(ours[~nan], theirs[~nan])
    # torch itself gives more than one pattern for NaN, by the path its kernel takes.
    assert np.isnan(bfloat16_to_float32(ours[nan])).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_names_and_sizes(dtype):
    kind = getattr(torch, dtype.name)
    assert dtype.storage.itemsize == kind.itemsize
    assert _TYPES[dtype.safetensors] == kind
    numpy_type = onnx.helper.tensor_dtype_to_np_dtype(dtype.onnx)
    assert numpy_type == np.dtype(getattr(ml_dtypes, dtype.name, None) or dtype.name)


def test_tables_hold_every_type_once():
    assert len(dtypes.BY_NAME) == len(dtypes.BY_SAFETENSORS) == len(dtypes.BY_ONNX) == len(DTYPES)


def test_widening_is_exact_for_every_pattern():
    expected = torch.from_numpy(PATTERNS.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(bfloat16_to_float32(PATTERNS).view(np.uint32), expected.view(np.uint32))


def test_widening_into_memory_that_was_used():
    out = np.full((256, 256), np.nan, np.float32)
    found = bfloat16_to_float32(np.arange(1 << 16, dtype=np.uint16).reshape(256, 256), out)
    assert np.shares_memory(found, out)
    np.testing.assert_array_equal(out.view(np.uint32).ravel(), np.arange(1 << 16, dtype=np.uint32) << 16)


def test_every_bfloat16_is_rounded_to_itself():
    values = bfloat16_to_float32(PATTERNS)
    nan = np.isnan(values)
    back = float32_to_bfloat16(values)
    assert np.array_equal(back[~nan], PATTERNS[~nan])
    assert np.isnan(bfloat16_to_float32(back[nan])).all()


@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_every_pattern_with_every_kind_of_remainder(low):
    """Ties, their neighbours, denormals, infinities, values that overflow to infinity and NaNs, of both signs."""
    assert_same_rounding((PATTERNS.astype(np.uint32) << 16 | low).view(np.float32))


@pytest.mark.parametrize("seed", range(3))
def test_random_patterns(seed):
    bits = np.random.default_rng(seed).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    assert_same_rounding(bits.view(np.float32))


@settings(deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0), elements=st.floats(width=32)))
def test_any_shape(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_rounding(values)
        rounded = round_to(values, "bfloat16")
    assert rounded.dtype == np.float32
    assert rounded.shape == values.shape
    assert np.array_equal(rounded, torch.from_numpy(values.copy()).bfloat16().float().numpy(), equal_nan=True)


def test_arrays_in_any_order():
    values = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    for view in (values.T, values[::2, ::-1], np.asfortranarray(values)):
        assert_same_rounding(view)
        assert np.array_equal(bfloat16_to_float32(float32_to_bfloat16(view)), round_to(view, "bfloat16"))


def test_float32_is_left_alone():
    values = np.array([1.1, np.nan], np.float32)
    assert round_to(values, "float32") is values
    assert to_float32(values, "float32") is values


@pytest.mark.parametrize(
    "name", ["float32", "bfloat16", "float16", "float64", "int64", "int32", "int16", "int8", "uint8"]
)
def test_stored_weights_widen_as_in_torch(name):
    tensor = (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 20).abs().to(getattr(torch, name))
    raw = tensor.view(torch.int16) if name == "bfloat16" else tensor
    stored = raw.numpy().view(dtypes.BY_NAME[name].storage)
    widened = to_float32(stored, name)
    assert widened.dtype == np.float32
    assert np.array_equal(widened, tensor.float().numpy())


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_not_taken_for_integers(name):
    with pytest.raises(TypeError, match=name):
        to_float32(np.zeros(3, np.uint8), name)
