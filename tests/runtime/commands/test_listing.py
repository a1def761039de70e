"""``zimg-run list``."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.commands import invoke
from zimgkit.runtime import demo_models
from zimgkit.runtime.commands.cli import main

CARRIED = demo_models.locate("zimg-tiny-z")


@pytest.fixture
def here(tmp_path, monkeypatch):
    for variable in ("HF_HUB_CACHE", "MODELSCOPE_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HOME", str(tmp_path))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def listed(*folders: object) -> list[dict[str, object]]:
    result = invoke(main, "list", *folders, "--json")
    assert (result.code, result.err) == (0, "")
    found: list[dict[str, object]] = json.loads(result.out)
    return found


def test_everywhere(here: Path) -> None:
    shutil.copytree(CARRIED, here / "mine")
    snapshot = here.parent / "hf/hub/models--owner--bundle/snapshots/0b1c"
    shutil.copytree(CARRIED, snapshot)
    shutil.copytree(CARRIED, here.parent / ".cache/modelscope/hub/models/owner/many/int8")
    found = listed()
    paths = [*map(demo_models.locate, demo_models.ALL), here / "mine", snapshot]
    assert [entry["path"] for entry in found] == [
        *map(str, paths), str(here.parent / ".cache/modelscope/hub/models/owner/many/int8")
    ]  # fmt: skip
    size = sum(record["size"] for record in json.loads((CARRIED / "bundle.json").read_bytes())["files"].values())
    expected = {"name": "zimg-tiny-z", "family": "z-image", "precision": "bfloat16", "bytes": size}
    assert {key: found[0][key] for key in expected} == expected
    lines = invoke(main, "list").out.splitlines()
    assert lines[1].split()[:3] == ["zimg-tiny-qwen", "qwen-image", "bfloat16"]
    assert lines[2].split()[:3] == ["zimg-tiny-qwen-edit", "qwen-image", "bfloat16"]
    assert lines[3].endswith(f"  {here / 'mine'}")


def test_a_folder_and_its_children_once_each(here: Path) -> None:
    shutil.copytree(CARRIED, here / "a")
    (here / "again").symlink_to("a")
    (here / "file").write_text("")
    (here / "closed").symlink_to("closed")
    assert [entry["path"] for entry in listed(here)] == [str(here / "a")]
    assert [entry["path"] for entry in listed(here / "a", here)] == [str(here / "a")]
    nothing = invoke(main, "list", here.parent / "here" / "a" / "tokenizer")
    assert (nothing.code, nothing.out, nothing.err) == (0, "", "no bundles there; zimg-export build makes them\n")
    assert listed(here / "a" / "tokenizer") == []


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"schema_version": 99}', "\xff", "folder", "link", "weights"])
def test_broken_ones_are_named_in_a_line(here: Path, broken: str) -> None:
    bundle = shutil.copytree(CARRIED, here / "b")
    manifest = bundle / "bundle.json"
    if broken == "weights":
        (bundle / "denoiser.onnx").unlink()
    else:
        manifest.unlink()
        if broken == "folder":
            manifest.mkdir()
        elif broken == "link":
            manifest.symlink_to("bundle.json")
        else:
            manifest.write_bytes(broken.encode("latin-1"))
    (entry,) = listed(here)
    assert entry["path"] == str(bundle) and entry["error"]
    result = invoke(main, "list", here)
    assert (result.code, result.err) == (0, "")
    assert result.out == f"broken: {entry['error']}\n"
    assert "b" in str(entry["error"]) and "internal" not in result.out


def test_folders_that_cannot_be_listed(here: Path) -> None:
    invoke(main, "list", here / "none").assert_refused("does not exist", 2)
    closed = here / "closed"
    closed.mkdir(mode=0)
    if os.getuid():
        assert listed(closed) == []
