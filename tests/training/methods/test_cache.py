from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zimgkit.engines.errors import CheckpointError, OutputError
from zimgkit.training.methods.cache import ROWS, Index, Texts, make_cache, open_cache

INDEX = Index("sft", "z-image", "abc", tuple((f"p{row}", 32, 32) for row in range(2 * ROWS)), 1, {}, {})


def make(row: int) -> dict[str, Tensor]:
    return {"text": torch.full((2 + row % 3, 4), float(row)), "latents": torch.full((1, 4, 4), float(row))}


def test_rows_come_back(tmp_path: Path) -> None:
    make_cache(tmp_path / "c", INDEX, make)
    cache = open_cache(tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 1 + 3
    assert cache.length(70) == 3 and torch.equal(cache.get("text", 70), make(70)["text"])
    assert torch.equal(cache.of_rows(torch.tensor([5, 100]))[:, 0, 0, 0], torch.tensor([5.0, 100.0]))
    assert len(Texts(cache)) == 2 * ROWS
    assert torch.equal(Texts(cache, no_prompts=True)[0], make(2 * ROWS)["text"])


def test_what_was_broken_off_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    asked: list[int] = []

    def stop(row: int) -> dict[str, Tensor]:
        asked.append(row)
        if row == ROWS + 3:
            raise KeyboardInterrupt
        return make(row)

    with pytest.raises(KeyboardInterrupt):
        make_cache(tmp_path / "c", INDEX, stop)
    assert not list((tmp_path / "c").glob(".*"))
    with pytest.raises(CheckpointError, match=r"lacks 000001.safetensors and 1 more; run data_process again"):
        open_cache(tmp_path / "c")
    asked.clear()
    make_cache(tmp_path / "c", INDEX, lambda row: asked.append(row) or make(row))
    assert asked == list(range(ROWS, 2 * ROWS + 1))
    open_cache(tmp_path / "c")


def test_another_cache_is_not_mixed_in(tmp_path: Path) -> None:
    make_cache(tmp_path / "c", INDEX, make)
    with pytest.raises(OutputError, match="holds a cache of something else"):
        make_cache(tmp_path / "c", replace(INDEX, of="other"), make)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").touch()
    with pytest.raises(OutputError, match="is not empty, and holds no cache"):
        make_cache(tmp_path / "full", INDEX, make)


@pytest.mark.parametrize("text", ["", "[]", '{"task": 1}'])
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=r"holds no cache\.json; make it with a task"):
        open_cache(tmp_path)
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"cache\.json cannot be read"):
        open_cache(tmp_path)


def test_a_broken_file(tmp_path: Path) -> None:
    make_cache(tmp_path / "c", INDEX, make)
    (tmp_path / "c" / "000001.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(CheckpointError, match=r"000001.safetensors cannot be read .*; remove it and run"):
        open_cache(tmp_path / "c").get("text", 1)
