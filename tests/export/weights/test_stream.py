"""Tensors on their way into a bundle: linked, cast, transformed, streamed in pieces."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from zimgkit.engines.errors import CheckpointError, LoraError
from zimgkit.engines.tensors.safetensors import read_header
from zimgkit.export.lora.deltas import Addend, LowRank
from zimgkit.export.weights import stream as weights
from zimgkit.export.weights.stream import Encoding, Wanted, export_weights, linked_from, pieces


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A component in two shards: one all bfloat16, one of mixed types."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    save_file({"a": random(7, 5).bfloat16(), "b": random(300).bfloat16()}, folder / "m-00001-of-00002.safetensors")
    save_file(
        {"c": random(4, 3), "d": random(2, 6).half(), "e": random(8).bfloat16()},
        folder / "m-00002-of-00002.safetensors",
    )
    return folder


def wanted(folder: Path, *names: str) -> dict[str, Wanted]:
    infos = {}
    for file in sorted(folder.glob("*.safetensors")):
        infos |= read_header(file)
    return {f"net.{name}": Wanted(infos[name], infos[name].shape) for name in names or infos}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.rglob("*.safetensors") for name, value in load_file(file).items()}


def test_unchanged_files_are_linked_and_the_rest_is_cast(shards, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    progress = []
    placed = export_weights({"net": wanted(shards)}, "bfloat16", out, lambda *done: progress.append(done))["net"]
    linked = out / "transformer" / "m-00001-of-00002.safetensors"
    assert linked.samefile(shards / "m-00001-of-00002.safetensors")
    assert {info.file.name for info in placed.values()} == {linked.name, "net.safetensors"}
    source, result = tensors(shards), tensors(out)
    assert {info.name for info in placed.values()} == set(source)
    for name, value in source.items():
        assert torch.equal(result[name], value.bfloat16()), name
    assert progress[-1][0] == progress[-1][1] == 2 * (12 + 12 + 8)


def test_widening_to_float32_writes_everything(shards, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export_weights({"net": wanted(shards)}, "float32", out)
    result = tensors(out)
    assert [file.name for file in out.rglob("*.safetensors")] == ["net.safetensors"]
    for name, value in tensors(shards).items():
        assert torch.equal(result[name], value.float()), name


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP])
def test_where_links_cannot_be_made_only_the_wanted_tensors_are_copied(shards, tmp_path, monkeypatch, code):
    out = tmp_path / "out"
    out.mkdir()

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(weights.os, "link", refuse)
    export_weights({"net": wanted(shards, "a")}, "bfloat16", out)
    assert list(tensors(out)) == ["a"]
    assert torch.equal(tensors(out)["a"], tensors(shards)["a"])


def test_two_components_share_one_linked_file(shards, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    placed = export_weights({"x": wanted(shards, "a"), "y": wanted(shards, "b")}, "bfloat16", out)
    assert placed["x"]["net.a"].file == placed["y"]["net.b"].file
    assert len(list(out.rglob("*.safetensors"))) == 1


def test_transforms_see_float32_of_the_stored_shape(shards, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    want = wanted(shards, "a")["net.a"]

    def last_column(values: np.ndarray) -> np.ndarray:
        assert values.dtype == np.float32
        assert values.shape == (7, 5)
        return 2 * values[:, -1:]

    placed = export_weights({"net": {"net.a": Wanted(want.source, (7, 1), last_column)}}, "bfloat16", out)
    assert placed["net"]["net.a"].shape == (7, 1)
    assert torch.equal(tensors(out)["a"], (2 * tensors(shards)["a"][:, -1:].float()).bfloat16())


@pytest.mark.parametrize("piece", [1, 3, 64])
def test_pieces_of_any_size_make_the_same_file(shards, tmp_path, monkeypatch, piece):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(weights, "PIECE", piece)
    export_weights({"net": wanted(shards, "c", "d", "e")}, "bfloat16", out)
    for name, value in tensors(shards).items():
        if name in "cde":
            assert torch.equal(tensors(out)[name], value.bfloat16())


@pytest.fixture
def with_lora(shards, tmp_path):
    """The tensors of both shards; a LoRA adds to one in each."""
    generator = torch.Generator().manual_seed(1)
    found = {
        f"{name}.{side}": torch.randn(shape, generator=generator)
        for name, (rows, columns) in {"a": (7, 5), "c": (4, 3)}.items()
        for side, shape in (("up", (rows, 2)), ("down", (2, columns)))
    }
    save_file(found, tmp_path / "lora.safetensors")
    infos = read_header(tmp_path / "lora.safetensors")
    wants = wanted(shards)
    for name in "ac":
        addend = Addend(LowRank(infos[f"{name}.up"], infos[f"{name}.down"], 1.0), 0.5)
        wants[f"net.{name}"] = replace(wants[f"net.{name}"], addends=(addend,))
    source = tensors(shards)
    merged = {n: source[n].float() + 0.5 * found[f"{n}.up"] @ found[f"{n}.down"] for n in "ac"}
    return wants, {name: value.float() for name, value in source.items()} | merged


def test_what_loras_touch_lies_in_a_file_of_its_own(shards, with_lora, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    wants, expected = with_lora
    placed = export_weights({"net": wants}, "bfloat16", out)["net"]
    files = {file.name: load_file(file) for file in out.iterdir()}
    assert {name: set(values) for name, values in files.items()} == {
        "net.lora.safetensors": {"a", "c"},
        "net.safetensors": {"b", "d", "e"},
    }
    assert all(placed[f"net.{name}"].file.name == file for file, values in files.items() for name in values)
    for name, value in tensors(out).items():
        assert torch.equal(value, expected[name].bfloat16()), name


def test_keeping_the_base(shards, with_lora, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    wants, expected = with_lora
    progress = []
    placed = export_weights({"net": wants}, "bfloat16", out, lambda *done: progress.append(done), keep_base=True)["net"]
    files = {file.name: load_file(file) for file in out.rglob("*.safetensors")}
    linked = "m-00001-of-00002.safetensors"
    assert {name: set(values) for name, values in files.items()} == {
        linked: {"a", "b"},
        "net.lora.safetensors": {"a", "c"},
        "net.base.safetensors": {"c"},
        "net.safetensors": {"d", "e"},
    }
    source = tensors(shards)
    assert torch.equal(files[linked]["a"], source["a"])
    assert torch.equal(files["net.base.safetensors"]["c"], source["c"])
    assert {info.file.name for name, info in placed.items() if name in ("net.a", "net.c")} == {"net.lora.safetensors"}
    for name in "ac":
        assert torch.equal(files["net.lora.safetensors"][name], expected[name].bfloat16())
    assert progress[-1][0] == progress[-1][1] == 2 * (35 + 12 + 12 + 8) + 4 * 12


def test_a_file_that_ends_early_is_an_error(shards, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    want = wanted(shards, "c")
    file = shards / "m-00002-of-00002.safetensors"
    os.truncate(file, want["net.c"].source.offset + 4)
    with pytest.raises(OSError, match="ended early"):
        export_weights({"net": want}, "bfloat16", out)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("name", ["c", "d", "e"])
@pytest.mark.parametrize("kind", ["copied", "transformed", "encoded"])
def test_what_is_no_number_is_named(shards, tmp_path, name, kind):
    file = shards / "m-00002-of-00002.safetensors"
    state = load_file(file)
    state[name].reshape(-1)[[0, 3, -1]] = torch.tensor([NAN, INF, -INF]).to(state[name].dtype)
    save_file(state, file)
    want = wanted(shards, name)["net." + name]
    if kind == "transformed":
        want = replace(want, transform=lambda values: 2 * values)
    if kind == "encoded":
        want = replace(want, encoding=Encoding("int8", lambda rows: (np.zeros(r.size, np.int8) for r in rows)))
    with pytest.raises(CheckpointError, match=rf"00002\.safetensors: '{name}' has 3 values that are NaN or infinite"):
        export_weights({"net": {"x": want}}, "bfloat16", tmp_path)


def test_what_a_precision_cannot_hold_is_named(tmp_path):
    """The largest float32 is rounded to infinity, the largest bfloat16 is not."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file({"a": torch.tensor([3.4e38, 3.3895e38, -3.4e38, 1e38])}, folder / "m.safetensors")
    with pytest.raises(CheckpointError) as caught:
        export_weights({"net": wanted(folder)}, "bfloat16", tmp_path)
    message = f"{folder / 'm.safetensors'}: 'a' has 2 values that bfloat16 cannot hold"
    assert str(caught.value) == f"{message}; build it in float32: --precision fp32"


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_lora_that_overflows_is_named(shards, with_lora, tmp_path, precision, recwarn):
    wants, _ = with_lora
    (addend,) = wants["net.c"].addends
    huge = replace(addend, scale=1e39 if precision == "float32" else 2e38, label="huge.safetensors: c")
    for own in ((huge,), (addend, huge)):
        wants["net.c"] = replace(wants["net.c"], addends=own)
        with pytest.raises(
            LoraError, match=rf"^huge.safetensors: c changes 'c' to \d+ values that are .* in {precision}"
        ):
            export_weights({"net": wants}, precision, tmp_path)
    assert not recwarn


def test_loras_that_overflow_together(shards, with_lora, tmp_path):
    wants, _ = with_lora
    (addend,) = wants["net.c"].addends
    whole = replace(wants["net.c"], addends=(replace(addend, scale=1.0),))
    top = float(np.abs(np.concatenate([*pieces(whole, "float32")])).max())
    both = tuple(replace(addend, scale=2.5e38 / top, label=label) for label in ("one", "two"))
    with pytest.raises(LoraError, match=r"^one and two together change 'c' to NaN or infinities"):
        export_weights({"net": wants | {"net.c": replace(wants["net.c"], addends=both)}}, "float32", tmp_path)


def test_linked_tensors_are_those_nobody_read(shards, with_lora, tmp_path):
    wants = wanted(shards) | {"net.a": with_lora[0]["net.a"]}
    for keep, names in ((False, set()), (True, {"b"})):
        out = tmp_path / str(keep)
        out.mkdir()
        placed = export_weights({"net": wants}, "bfloat16", out, keep_base=keep)
        assert {source.name for source in linked_from({"net": wants}, placed).values()} == names
