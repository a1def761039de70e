"""The small model that edits, put together of another one and a difference."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimgkit.engines.bundle import MANIFEST, Bundle
from zimgkit.engines.errors import OutputError
from zimgkit.runtime import demo_models
from zimgkit.runtime.demo_models import assembled
from zimgkit.runtime.demo_models.assembled import WEIGHTS, add_difference, assemble, put_together

OWN, BASE = demo_models.FOLDER / demo_models.EDITOR, demo_models.FOLDER / demo_models.NAMES[1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of a user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("seed", range(5))
def test_differences_are_added_as_torch_adds(seed: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = 3 + 5 * seed, 2 + 4 * seed
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    bias, other = torch.randn(rows, generator=generator).bfloat16(), torch.ones(4).bfloat16()
    numbers = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, generator=generator)
    save_file({"a.weight": weight, "a.bias": torch.zeros(rows).bfloat16(), "b": other}, tmp_path / "weights")
    save_file({"a.weight": numbers, "a.weight.scale": scale, "a.bias": bias}, tmp_path / "difference")
    add_difference(tmp_path / "weights", tmp_path / "difference")
    found = load_file(tmp_path / "weights")
    assert torch.equal(found["a.weight"], (weight.float() + scale[:, None] * numbers).bfloat16())
    assert torch.equal(found["a.bias"], bias) and torch.equal(found["b"], other)


def test_the_bundle_is_what_its_manifest_says(cache: Path) -> None:
    root = demo_models.locate(demo_models.EDITOR)
    assert root.is_relative_to(cache) and demo_models.is_carried(root)
    bundle = Bundle.open(root)
    assert [*bundle.mismatches(afresh=True)] == []
    assert (bundle.manifest.name, bundle.manifest.tasks) == (demo_models.EDITOR, ("edit",))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert demo_models.locate(demo_models.EDITOR) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_what_is_installed_may_be_read_only(tmp_path: Path) -> None:
    shutil.copytree(OWN, tmp_path / "own")
    shutil.copytree(BASE, tmp_path / "base")
    for path in (*(tmp_path / "own").rglob("*"), *(tmp_path / "base").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    put_together(tmp_path / "whole", tmp_path / "own", tmp_path / "base")
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "whole").rglob("*"))
    assert [*Bundle.open(tmp_path / "whole").mismatches(afresh=True)] == []


def test_a_folder_of_that_name_is_its_owners(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = Path(demo_models.EDITOR)
    mine.mkdir()
    assert demo_models.locate(demo_models.EDITOR) == mine
    assert not demo_models.is_carried(mine) and not cache.exists()


def test_several_at_once(cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: assemble(OWN, BASE), range(8)))
    assert len(found) == 1
    (root,) = found
    assert [*Bundle.open(root).mismatches(afresh=True)] == []
    assert [path.name for path in root.parent.iterdir()] == [demo_models.EDITOR]


def test_a_kill_in_the_middle_leaves_nothing_that_counts(cache: Path) -> None:
    program = f"""
import os
from pathlib import Path
from zimgkit.runtime.demo_models import assembled
assembled.add_difference = lambda *_: os._exit(9)
assembled.assemble(Path({str(OWN)!r}), Path({str(BASE)!r}))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert not [*cache.rglob(f"{demo_models.EDITOR}/{MANIFEST}")] and [*cache.rglob(f"*.part/{MANIFEST}")]
    root = assemble(OWN, BASE)
    assert [*Bundle.open(root).mismatches(afresh=True)] == []
    assert [path.name for path in root.parent.iterdir()] == [demo_models.EDITOR]


def test_where_the_cache_cannot_be_written(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_bytes(b"no folder")
    monkeypatch.setattr(assembled.tempfile, "tempdir", str(tmp_path))
    root = assemble(OWN, BASE)
    assert root.parent.parent == tmp_path and Bundle.open(root).manifest.name == demo_models.EDITOR
    monkeypatch.setattr(assembled.tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(OutputError, match=r"put together when it is first used, and .* cannot be written .*XDG_CACHE"):
        assemble(OWN, BASE)


def test_only_weights_differ_in_size_from_the_base(tmp_path: Path) -> None:
    put_together(tmp_path / "whole", OWN, BASE)
    first, second = (load_file(folder / WEIGHTS) for folder in (BASE, tmp_path / "whole"))
    assert first.keys() == second.keys()
    changed = [name for name in first if not torch.equal(first[name], second[name])]
    assert len(changed) > 100
    assert all(torch.isfinite(second[name]).all() for name in changed)
