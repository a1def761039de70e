"""Copying arrays into tensors of ONNX Runtime and back, against ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from zimgkit.engines.onnxruntime.values import Place, converted, download, empty, fill, on_host, upload

HOST = Place("cpu")
FLOAT32, BFLOAT16, INT64 = 1, 16, 7
VALUES = np.array([[1, 1 + 2**-8, 1 + 3 * 2**-8], [-0.0, 3.4e38, 1e-40]], np.float32)
ROUNDED = VALUES.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize(("place", "device"), [(HOST, "cpu"), (Place("cuda"), "cuda:0"), (Place("cuda", 3), "cuda:3")])
def test_names_of_devices(place, device):
    assert place.device == device


@pytest.mark.parametrize(
    "array",
    [VALUES, np.float32(2).reshape(()), np.zeros((0, 3), np.float32), np.arange(6).reshape(2, 3).T, np.array([True])],
    ids=["matrix", "scalar", "nothing", "transposed", "bool"],
)
def test_there_and_back(array):
    value = upload(array, array.dtype.name, HOST)
    found = download(value)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)
    found[...] = 1
    np.testing.assert_array_equal(download(value), array)


def test_bfloat16():
    value = upload(VALUES, "bfloat16", HOST)
    assert (value.element_type(), value.shape()) == (BFLOAT16, [2, 3])
    np.testing.assert_array_equal(download(value), ROUNDED)
    np.testing.assert_array_equal(download(on_host(VALUES, BFLOAT16)), ROUNDED)


def test_on_the_host_nothing_is_copied_without_need():
    value = on_host(VALUES, FLOAT32)
    assert value.data_ptr() == VALUES.ctypes.data
    transposed = on_host(VALUES.T, FLOAT32)
    np.testing.assert_array_equal(download(transposed), VALUES.T)


def test_an_array_of_another_element_type_is_converted():
    value = empty((3,), FLOAT32, HOST)
    fill(value, np.arange(3, dtype=np.float64))
    np.testing.assert_array_equal(download(value), np.arange(3, dtype=np.float32))


def test_converted():
    value = upload(VALUES, "float32", HOST)
    assert converted(value, FLOAT32, HOST) is value
    half = converted(value, BFLOAT16, HOST)
    assert half.element_type() == BFLOAT16
    np.testing.assert_array_equal(download(converted(half, FLOAT32, HOST)), ROUNDED)
    assert converted(upload(np.arange(3), "int64", HOST), INT64, HOST).element_type() == INT64
