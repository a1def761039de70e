"""NaN and infinities, counted as torch counts them, and in linked files while those are hashed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from zimgkit.engines.bundle import record_files, verified
from zimgkit.engines.errors import CheckpointError
from zimgkit.engines.tensors.safetensors import TensorInfo, read_header
from zimgkit.export.weights.finite import BLOCK, LOWEST, LinkedTensors, count_non_finite


def as_torch_counts(bits: np.ndarray, dtype: str) -> int:
    values = torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(getattr(torch, dtype))
    values = values.float() if bits.itemsize == 1 else values
    return int((~torch.isfinite(values)).sum())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_every_bit_pattern(dtype):
    width = 1 if dtype.startswith("float8") else 2
    bits = np.arange(256**width, dtype=f"u{width}")
    assert count_non_finite(bits, dtype) == as_torch_counts(bits, dtype) > 0
    for value in (
        (*range(0x7B, 0x100),)
        if width == 1
        else (0, 0x7BFF, 0x7C00, 0x7F7F, 0x7F80, 0x7FFF, 0xFBFF, 0xFC00, 0xFF80, 0xFFFF)
    ):
        alone = bits[value : value + 1]
        assert count_non_finite(alone, dtype) == as_torch_counts(alone, dtype)
    assert count_non_finite(bits[:0], dtype) == 0


@pytest.mark.parametrize("dtype", LOWEST)
@pytest.mark.parametrize("extra", [-1, 0, 7])
def test_any_place_of_many_blocks(dtype, extra):
    width = 8 if dtype == "float64" else 4 if dtype == "float32" else 1 if dtype.startswith("float8") else 2
    generator = np.random.default_rng(0)
    size = 3 * BLOCK // width + extra
    bits = generator.integers(0, LOWEST[dtype] - 1, size, dtype=f"u{width}")
    bits[::2] |= np.array(1 << (8 * width - 1), bits.dtype)
    assert count_non_finite(bits, dtype) == as_torch_counts(bits, dtype) == 0
    for place, value in (
        (0, LOWEST[dtype]),
        (size // 2, LOWEST[dtype] | 1 << (8 * width - 1)),
        (-1, 2 ** (8 * width) - 1),
    ):
        bits[place] = value
    assert count_non_finite(bits, dtype) == count_non_finite(bits.reshape(1, -1), dtype) == 3
    assert as_torch_counts(bits, dtype) == 3


def test_whole_numbers_are_finite():
    assert (
        count_non_finite(np.full(9, -1, np.int32), "int32") == count_non_finite(np.full(9, 255, np.uint8), "uint8") == 0
    )


@pytest.fixture
def linked(tmp_path, monkeypatch):
    """Hash a file of a folder as a bundle's, in chunks of 64 bytes, and complain."""
    monkeypatch.setattr(verified, "CHUNK", 64)

    def check(state: dict[str, torch.Tensor], wanted: tuple[str, ...]) -> LinkedTensors:
        folder = tmp_path / "bundle"
        folder.mkdir()
        save_file(state, folder / "m.safetensors")
        infos = read_header(folder / "m.safetensors")
        files = {
            infos[name]: TensorInfo(**{**vars(infos[name]), "file": Path("/model/m.safetensors")}) for name in wanted
        }
        found = LinkedTensors(files)
        assert record_files(folder, found.look) == record_files(folder)
        return found

    return check


def some() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    kinds = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16, "d": torch.float8_e4m3fn, "e": torch.float32}
    state = {name: torch.randn(n, 37, generator=generator).to(kinds[name]) for n, name in enumerate(kinds, 1)}
    return state | {"empty": torch.zeros(0), "one": torch.ones(())}


@pytest.mark.parametrize("name", [*"abcde", "one"])
def test_each_value_of_a_linked_tensor_counts(linked, name):
    state = some()
    state[name].reshape(-1)[0] = float("nan")
    state[name].reshape(-1)[-1] = float("nan")
    count = "1 value that is" if name == "one" else "2 values that are"
    with pytest.raises(CheckpointError) as caught:
        linked(state, tuple(state)).check()
    assert (
        str(caught.value) == f"/model/m.safetensors: {name!r} has {count} NaN or infinite; fetch the checkpoint again"
    )


def test_what_nobody_wants_may_be_anything(linked):
    state = some()
    for name in "ace":
        state[name].fill_(float("inf"))
    linked(state, ("b", "d", "one", "empty")).check()


def test_all_tensors_are_counted(linked):
    state = some() | {"a": torch.full((500,), float("-inf")), "b": torch.full((9,), float("nan")).half()}
    with pytest.raises(CheckpointError, match=r"'a' has 500 values .* \(and 1 more tensor likewise\)"):
        linked(state, tuple(state)).check()
