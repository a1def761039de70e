"""What was traced is found again, by all that it follows from and by nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from zimgkit.engines.errors import UsageError
from zimgkit.export.graphs import traces
from zimgkit.export.graphs.trace import Example, Kind
from zimgkit.runtime.disk_cache import sealed

FREE = Example(torch.empty(3, 8, device="meta"), (0,))


def linear(**settings) -> Kind:
    with torch.device("meta"):
        return Kind("Product", nn.Linear(8, 5, **settings), (FREE,), 1)


def norm(**settings) -> Kind:
    with torch.device("meta"):
        return Kind("Norm", nn.LayerNorm(8, **settings), (FREE,), 1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "zimgkit" / "traces"


_TRACED: dict[str | None, Any] = {}


def traced_once(kinds, trace=traces.trace):
    """What is traced, once for all tests: it takes seconds."""
    key = traces.fingerprint(kinds)
    if key not in _TRACED:
        _TRACED[key] = trace(kinds)
    return _TRACED[key]


@pytest.fixture
def count(monkeypatch):
    """How often something was traced."""
    calls = []
    monkeypatch.setattr(traces, "trace", lambda kinds: calls.append(kinds) or traced_once(kinds))
    return calls


def as_text(functions):
    return [str(function) for function in functions]


def test_the_same_is_traced_once(folder, count):
    first = traces.traced([linear(), norm()])
    second = traces.traced([linear(), norm()])
    assert len(count) == 1 and as_text(first) == as_text(second)
    assert [function.name for function in first] == ["Product", "Norm"]
    assert [value.name for value in first[0].inputs] == ["input_0", "weight", "bias"]
    assert len(list(folder.glob("*.onnx"))) == 1


def cut_between_functions(data: bytes) -> bytes:
    """Still a model, which lacks the last function."""
    model = onnx.ModelProto.FromString(data[:-4])
    del model.functions[-1]
    return model.SerializeToString()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"x",
        lambda data: b"\x08\x0b",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-4],
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
        cut_between_functions,
        lambda data: sealed(cut_between_functions(data)),
        lambda data: data + data,
    ],
    ids=["empty", "byte", "no functions", "end", "half", "unsealed", "flipped", "cut", "fewer", "twice"],
)
def test_a_damaged_entry_is_made_again(folder, count, damage):
    first = traces.traced([norm(), linear()])
    (entry,) = folder.glob("*.onnx")
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert as_text(traces.traced([norm(), linear()])) == as_text(first)
    assert len(count) == 2 and entry.read_bytes() == whole


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path), lambda path: path.symlink_to("/dev")])
def test_what_is_no_file_in_the_place_of_an_entry(folder, count, make):
    first = traces.traced([norm()])
    (entry,) = folder.glob("*.onnx")
    entry.unlink()
    make(entry)
    assert as_text(traces.traced([norm()])) == as_text(first)


def test_no_right_to_read_an_entry(folder, count, monkeypatch):
    first = traces.traced([norm()])
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.suffix == ".onnx":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert as_text(traces.traced([norm()])) == as_text(first)
    assert len(count) == 2


def test_switched_off(folder, count, monkeypatch):
    monkeypatch.setenv("ZIMG_CACHE_LIMIT", "0")
    for _ in range(2):
        (function,) = traces.traced([norm()])
        assert function.name == "Norm"
    assert len(count) == 2 and not folder.exists()


def test_a_bad_limit(folder, monkeypatch):
    monkeypatch.setenv("ZIMG_CACHE_LIMIT", "lots")
    with pytest.raises(UsageError, match="ZIMG_CACHE_LIMIT is 'lots'"):
        traces.traced([norm()])


def test_old_entries_make_room(folder, monkeypatch):
    traces.traced([norm()])
    (first,) = folder.glob("*.onnx")
    monkeypatch.setenv("ZIMG_CACHE_LIMIT", str(first.stat().st_size + 10))
    traces.traced([norm(eps=0.5)])
    (second,) = folder.glob("*.onnx")
    assert second != first


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, count):
    (tmp_path / "zimgkit").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (function,) = traces.traced([norm()])
    assert function.name == "Norm" and len(count) == 1


def test_what_a_trace_follows_from():
    """No two of these share an entry."""
    wide = Example(torch.empty(3, 8, dtype=torch.bfloat16, device="meta"), (0,))
    kinds = [
        [norm()],
        [norm(), norm()],
        [norm(eps=0.5)],
        [norm(elementwise_affine=False)],
        [norm(dtype=torch.bfloat16)],
        [replace(norm(), name="Other")],
        [replace(norm(), outputs=2)],
        [replace(norm(), inputs=(wide,))],
        [replace(norm(), inputs=(Example(FREE.tensor, ()),))],
        [replace(norm(), inputs=(Example(torch.empty(4, 8, device="meta"), (0,)),))],
        [linear()],
        [linear(bias=False)],
        [replace(norm(), module=nn.RMSNorm(8, device="meta"))],
        [replace(norm(), module=nn.Sequential(nn.LayerNorm(8, device="meta")))],
    ]
    found = [traces.fingerprint(own) for own in kinds]
    assert None not in found and len(set(found)) == len(found)


def test_weights_do_not_count():
    with torch.no_grad():
        one, other = (replace(norm(), module=nn.LayerNorm(8)) for _ in range(2))
        other.module.weight.mul_(2)
    assert traces.fingerprint([one]) == traces.fingerprint([other])


class Foreign(nn.Module):
    def forward(self, x):
        return x + 1


def test_what_is_not_known_whole_is_not_kept(folder, count):
    """A module whose code may change, or whose settings ``repr`` may not tell apart."""
    opaque = norm()
    opaque.module.table = object()
    assert traces.fingerprint([opaque]) is None
    foreign = Kind("Foreign", Foreign(), (FREE,), 1)
    assert traces.fingerprint([norm(), foreign]) is None
    (function,) = traces.traced([foreign])
    assert function.name == "Foreign" and len(count) == 1 and not folder.exists()


def test_code_and_versions_count(tmp_path, monkeypatch):
    before = traces.fingerprint([norm()])
    for change in (("version", lambda name: "0"), ("__file__", str(tmp_path / "traces.py"))):
        with monkeypatch.context() as patch:
            patch.setattr(traces, *change)
            traces._code.cache_clear()
            assert traces.fingerprint([norm()]) != before
    traces._code.cache_clear()
    assert traces.fingerprint([norm()]) == before
