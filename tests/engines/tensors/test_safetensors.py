"""Reading and writing safetensors files, held against the ``safetensors`` library in both directions."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from zimgkit.engines.tensors.dtypes import BY_NAME, BY_SAFETENSORS, DTYPES
from zimgkit.engines.tensors.safetensors import (
    MAX_HEADER,
    SafetensorsError,
    TensorInfo,
    layout,
    read_header,
    view,
    write,
)

SHAPES = [(), (1,), (7,), (0,), (3, 0, 2), (2, 3), (5, 1, 4), (2, 1, 3, 2)]
IN_ONE_FOLDER = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def random_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bytes at all; for bool, zeros and ones."""
    dtype, count = getattr(torch, name), int(np.prod(shape, dtype=int))
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file of a header, given as an object or as its bytes, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def assert_reads(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """Names, element types, shapes and bytes are those of the tensors, by offset and by view."""
    found, content = read_header(path), path.read_bytes()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        info = found[name]
        assert (info.file, info.name) == (path, name)
        assert (f"torch.{info.dtype}", info.shape) == (str(tensor.dtype), tuple(tensor.shape))
        assert content[info.offset : info.offset + info.nbytes] == raw(tensor)
        mapped = view(info)
        assert (mapped.dtype, mapped.shape) == (BY_NAME[info.dtype].storage, info.shape)
        assert mapped.tobytes() == raw(tensor)


def stored(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as numpy keeps it: bit patterns where numpy has no such type."""
    storage = BY_NAME[str(tensor.dtype).removeprefix("torch.")].storage
    return np.frombuffer(raw(tensor), storage).reshape(tuple(tensor.shape))


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], pieces: int = 1, **options: Any
) -> dict[str, TensorInfo]:
    """Write through :func:`write`, each tensor in so many flat pieces."""
    specs = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}
    parts = {
        name: [stored(t)] if pieces == 1 else np.array_split(stored(t).reshape(-1), pieces)
        for name, t in tensors.items()
    }
    return write(path, specs, parts, **options)


def refused(path: Path) -> str:
    """The one line that a file is refused with."""
    with pytest.raises(SafetensorsError) as caught:
        read_header(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    return message


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    names = draw(st.lists(text.filter(lambda name: name != "__metadata__"), max_size=6, unique=True))
    kinds, shapes = st.sampled_from([dtype.name for dtype in DTYPES]), st.lists(st.integers(0, 4), max_size=4)
    return {name: random_tensor(draw(kinds), tuple(draw(shapes)), seed) for seed, name in enumerate(names)}


class TestRead:
    @pytest.mark.parametrize("dtype", [dtype.name for dtype in DTYPES])
    def test_every_type_and_shape(self, tmp_path: Path, dtype: str) -> None:
        tensors = {f"t{index}": random_tensor(dtype, shape, index) for index, shape in enumerate(SHAPES)}
        save_file(tensors, tmp_path / "a.safetensors")
        assert_reads(tmp_path / "a.safetensors", tensors)

    @IN_ONE_FOLDER
    @given(tensor_sets())
    def test_what_the_library_writes(self, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
        assert_reads(tmp_path / "a.safetensors", tensors)

    def test_tensors_come_in_the_order_of_the_file(self, tmp_path: Path) -> None:
        header = {"b": entry(begin=8, end=16), "empty": entry(shape=[0], begin=8, end=8), "a": entry(begin=0, end=8)}
        path = raw_file(tmp_path / "a.safetensors", header, bytes(range(16)))
        found = read_header(path)
        assert list(found) == ["a", "empty", "b"]
        assert [view(info).tobytes() for info in found.values()] == [bytes(range(8)), b"", bytes(range(8, 16))]

    @pytest.mark.parametrize("header", [{}, {"__metadata__": {"format": "pt"}}, b"{}      "])
    def test_no_tensors(self, tmp_path: Path, header: Any) -> None:
        assert read_header(raw_file(tmp_path / "a.safetensors", header)) == {}

    def test_views_are_read_only_and_may_be_unaligned(self, tmp_path: Path) -> None:
        values = np.arange(3, dtype=np.float64)
        path = raw_file(
            tmp_path / "a.safetensors",
            b'{"a":' + json.dumps(entry("F64", [3], 0, 24)).encode() + b"}",
            values.tobytes(),
        )
        info = read_header(path)["a"]
        assert info.offset % 8
        assert np.array_equal(view(info), values)
        with pytest.raises(ValueError, match="read-only"):
            view(info)[0] = 1


class TestWrite:
    @IN_ONE_FOLDER
    @given(tensor_sets(), st.integers(1, 3))
    def test_the_library_reads_what_is_written(
        self, tmp_path: Path, tensors: dict[str, torch.Tensor], pieces: int
    ) -> None:
        path = tmp_path / "a.safetensors"
        infos = write_tensors(path, tensors, pieces)
        assert infos == read_header(path)
        assert_reads(path, tensors)
        loaded = load_file(path)
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
            assert raw(loaded[name]) == raw(tensor)

    @IN_ONE_FOLDER
    @given(tensor_sets())
    def test_every_tensor_is_aligned_to_its_own_size(self, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
        for info in write_tensors(tmp_path / "a.safetensors", tensors).values():
            assert info.offset % BY_NAME[info.dtype].storage.itemsize == 0

    def test_metadata(self, tmp_path: Path) -> None:
        metadata = {"format": "pt", "名": 'quoted " and é'}
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, metadata=metadata)
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            assert file.metadata() == metadata
        write_tensors(tmp_path / "b.safetensors", {"a": torch.ones(2)})
        with safe_open(tmp_path / "b.safetensors", "pt") as file:
            assert file.metadata() is None

    def test_layout_says_where_tensors_will_lie_before_any_is_written(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        specs = {"half": ("float16", (3,)), "wide": ("float64", (2, 2)), "byte": ("int8", ())}
        prefix, infos = layout(path, specs)
        assert not path.exists()
        written = write(path, specs, {"half": [np.ones(3, np.float16)], "wide": [np.eye(2)], "byte": [np.int8(5)]})
        assert written == infos == read_header(path)
        assert path.read_bytes().startswith(prefix)
        assert np.array_equal(view(infos["wide"]), np.eye(2))

    def test_pieces_that_lie_strided_in_memory(self, tmp_path: Path) -> None:
        values = np.arange(24, dtype=np.float32).reshape(4, 6)
        info = write(tmp_path / "a.safetensors", {"a": ("float32", (6, 4))}, {"a": [values.T[:2], values.T[2:]]})["a"]
        assert np.array_equal(view(info), values.T)

    @pytest.mark.parametrize("piece", [np.ones(3, np.float32), np.ones(5, np.float32), np.ones(4, np.float64)])
    def test_pieces_that_do_not_add_up(self, tmp_path: Path, piece: np.ndarray) -> None:
        with pytest.raises(SafetensorsError, match=f"'a' got {piece.nbytes} of 16 bytes"):
            write(tmp_path / "a.safetensors", {"a": ("float32", (4,))}, {"a": [piece]})


HEADERS = [
    # What is wrong, header, data, what the message says.
    ("not an object", [1], b"", "not an object"),
    ("not JSON", b"{nonsense}", b"", "no readable safetensors header"),
    ("half of it", b'{"a": {"dtype": "F32", "sha', b"", "no readable safetensors header"),
    ("not UTF-8", b'{"\xff": {}}', b"", "no readable safetensors header"),
    ("UTF-16", '{"a": {}}'.encode("utf-16"), b"", "no readable safetensors header"),
    ("very deep", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "no readable safetensors header"),
    ("huge number", b'{"a": ' + b"9" * 10_000 + b"}", b"", "no readable safetensors header"),
    ("one name twice", b'{"a": {"dtype": "U8"}, "a": {"dtype": "U8"}}', b"", "a name occurs twice"),
    ("one key twice", b'{"a": {"dtype": "U8", "dtype": "I8"}}', b"", "a name occurs twice"),
    ("entry is a list", {"a": ["F32", [2], [0, 8]]}, bytes(8), "'a' has no readable shape"),
    ("entry is null", {"a": None}, b"", "'a' has no readable shape"),
    ("no type", {"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "'a' is of type None; zimgkit reads F32"),
    ("no shape", {"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), "no readable shape"),
    ("no offsets", {"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "no readable shape and data_offsets"),
    ("unknown type", {"a": entry("C64", [1])}, bytes(8), "'a' is of type 'C64'; zimgkit reads F32, BF16"),
    ("type is a list", {"a": entry(["F32"])}, bytes(8), "'a' is of type ['F32']"),
    ("negative side", {"a": entry(shape=[-2])}, bytes(8), "no readable shape"),
    ("two negative sides", {"a": entry(shape=[-1, -2])}, bytes(8), "no readable shape"),
    ("fractional side", {"a": entry(shape=[2.0])}, bytes(8), "no readable shape"),
    ("side is true", {"a": entry(shape=[2, True])}, bytes(8), "no readable shape"),
    ("side is text", {"a": entry(shape=["2"])}, bytes(8), "no readable shape"),
    ("shape is text", {"a": entry(shape="2")}, bytes(8), "no readable shape"),
    ("shape is a number", {"a": entry(shape=2)}, bytes(8), "no readable shape"),
    ("side is infinite", {"a": entry(shape=[float("inf")])}, bytes(8), "no readable shape"),
    ("enormous side", {"a": entry(shape=[2**63])}, bytes(8), "no readable shape"),
    ("enormous shape", {"a": entry(shape=[2**62] * 400)}, bytes(8), "do not fit its shape"),
    ("one offset", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, bytes(8), "no readable shape"),
    ("three offsets", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, bytes(8), "no readable"),
    ("offset is text", {"a": entry(begin="0")}, bytes(8), "no readable shape and data_offsets"),
    ("negative offset", {"a": entry(begin=-8, end=0)}, bytes(8), "no readable shape and data_offsets"),
    ("offsets swapped", {"a": entry(begin=8, end=0)}, bytes(8), "-8 bytes, which do not fit"),
    ("offsets too narrow", {"a": entry(end=7)}, bytes(7), "7 bytes, which do not fit its shape (2,)"),
    ("offsets of another type", {"a": entry("F64")}, bytes(8), "8 bytes, which do not fit its shape (2,)"),
    ("gap before", {"a": entry(begin=4, end=12)}, bytes(12), "'a' does not begin where the one before it ends"),
    ("gap between", {"a": entry(), "b": entry(begin=9, end=17)}, bytes(17), "'b' does not begin"),
    ("overlap", {"a": entry(), "b": entry(begin=4, end=12)}, bytes(12), "'b' does not begin"),
    ("the same bytes twice", {"a": entry(), "b": entry()}, bytes(8), "'b' does not begin"),
    ("empty tensor within another", {"a": entry(), "b": entry(shape=[0], begin=4, end=4)}, bytes(8), "'b' does not"),
    ("cut short", {"a": entry()}, bytes(7), "is cut short: "),
    ("no data", {"a": entry()}, b"", "is cut short: "),
    ("more data than tensors", {"a": entry()}, bytes(9), "goes on after its last tensor"),
    ("data and no tensors", {}, bytes(1), "goes on after its last tensor"),
]  # fmt: skip


class TestRefusal:
    @pytest.mark.parametrize(("header", "data", "message"), [case[1:] for case in HEADERS], ids=[c[0] for c in HEADERS])
    def test_wrong_headers(self, tmp_path: Path, header: Any, data: bytes, message: str) -> None:
        assert message in refused(raw_file(tmp_path / "a.safetensors", header, data))

    def test_missing(self, tmp_path: Path) -> None:
        assert refused(tmp_path / "a.safetensors").endswith("a.safetensors does not exist")

    def test_a_folder(self, tmp_path: Path) -> None:
        assert "Is a directory" in refused(tmp_path)

    @pytest.mark.parametrize("size", range(0, 40, 3))
    def test_cut_anywhere(self, tmp_path: Path, size: int) -> None:
        whole = tmp_path / "whole.safetensors"
        save_file({"a": torch.ones(4)}, whole)
        (tmp_path / "a.safetensors").write_bytes(whole.read_bytes()[:size])
        assert refused(tmp_path / "a.safetensors").endswith("fetch the file again")

    @pytest.mark.parametrize("length", [0, 1, MAX_HEADER + 1, 2**63, 2**64 - 1])
    def test_header_lengths_out_of_range(self, tmp_path: Path, length: int) -> None:
        path = tmp_path / "a.safetensors"
        with path.open("wb") as file:
            file.write(length.to_bytes(8, "little"))
            file.truncate(MAX_HEADER + 100)  # A hole; no disk is used.
        assert "is no safetensors file, or was cut short; fetch the file again" in refused(path)

    @pytest.mark.parametrize("content", [b"\x80\x04", b"\x80\x04\x95\x11", b"PK", b"PK\x03\x04" + bytes(100)])
    def test_the_beginning_of_a_pickle(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.safetensors").write_bytes(content)
        assert "looks like a pickle (.bin, .pt, .ckpt), which zimgkit never opens" in refused(
            tmp_path / "a.safetensors"
        )

    @pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize("count", [1, 100, 10_000])
    def test_pickles(self, tmp_path: Path, protocol: int, count: int) -> None:
        (tmp_path / "a.safetensors").write_bytes(pickle.dumps({"a": list(range(count))}, protocol))
        assert "looks like a pickle" in refused(tmp_path / "a.safetensors")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_what_torch_saves(self, tmp_path: Path, zipped: bool) -> None:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.safetensors", _use_new_zipfile_serialization=zipped)
        assert "looks like a pickle" in refused(tmp_path / "a.safetensors")

    @pytest.mark.parametrize("length", [0x0280, 0x0480, 0x0580])
    def test_a_length_that_begins_like_a_pickle(self, tmp_path: Path, length: int) -> None:
        (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a"')
        assert "pickle" not in refused(tmp_path / "a.safetensors")

    def test_a_git_lfs_pointer(self, tmp_path: Path) -> None:
        text = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 123\n"
        (tmp_path / "a.safetensors").write_bytes(text)
        assert "Git LFS pointer: fetch the file itself (git lfs pull)" in refused(tmp_path / "a.safetensors")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)
NUMBERS = st.integers(-1, 10) | JSON
ENTRIES = st.fixed_dictionaries({
    "dtype": st.sampled_from([*BY_SAFETENSORS, "X"]) | JSON,
    "shape": st.lists(NUMBERS, max_size=3) | JSON,
    "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
})  # fmt: skip


@st.composite
def nearly_right(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header of tensors back to back, named in any order, and the data's size; now and then a little off."""
    header, position = {}, 0
    for name in draw(st.permutations("abc"))[: draw(st.integers(0, 3))]:
        dtype = draw(st.sampled_from(["U8", "BOOL", "F16", "BF16", "F32", "F64"]))
        shape = draw(st.lists(st.integers(0, 3), max_size=2))
        end = position + int(np.prod(shape, dtype=int)) * BY_SAFETENSORS[dtype].storage.itemsize
        header[name], position = entry(dtype, shape, position, end), end
    if header and draw(st.booleans()):
        offsets = header[draw(st.sampled_from(sorted(header)))]["data_offsets"]
        offsets[draw(st.integers(0, 1))] += draw(st.integers(-4, 4))
    size = max(0, position + draw(st.sampled_from([0, 0, 0, -1, 1])))
    return {name: header[name] for name in sorted(header)}, size


class TestFuzz:
    @IN_ONE_FOLDER
    @given(st.binary(max_size=64))
    def test_any_bytes(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.safetensors").write_bytes(content)
        self.read_or_refuse(tmp_path / "a.safetensors")

    @IN_ONE_FOLDER
    @given(st.binary(max_size=64), st.binary(max_size=16))
    def test_any_bytes_as_a_header(self, tmp_path: Path, header: bytes, data: bytes) -> None:
        self.read_or_refuse(raw_file(tmp_path / "a.safetensors", header, data))

    @IN_ONE_FOLDER
    @given(st.dictionaries(st.text(max_size=3), ENTRIES | JSON, max_size=3), st.binary(max_size=16))
    def test_any_json_as_a_header(self, tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
        self.read_or_refuse(raw_file(tmp_path / "a.safetensors", header, data))

    @settings(IN_ONE_FOLDER, max_examples=300)
    @given(nearly_right())
    def test_files_are_accepted_as_the_library_accepts_them(
        self, tmp_path: Path, made: tuple[dict[str, Any], int]
    ) -> None:
        header, size = made
        path = raw_file(tmp_path / "a.safetensors", header, bytes(i % 2 for i in range(size)))
        try:
            loaded = load_file(path)
        except SafetensorError:
            refused(path)
        else:
            assert_reads(path, loaded)

    @staticmethod
    def read_or_refuse(path: Path) -> None:
        try:
            found = read_header(path)
        except SafetensorsError:
            return
        size = path.stat().st_size
        assert all(8 <= info.offset <= info.offset + info.nbytes <= size for info in found.values())
