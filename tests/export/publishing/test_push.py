"""Uploading bundles with the real client, in a process of its own, to a small hub on the loopback address."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.runtime.loopback_hub import LoopbackHub
from zimgkit.engines.bundle import MANIFEST, Bundle, Cost, Difference, MergedLora, Quantization, Source, write_manifest
from zimgkit.export.publishing.card import base_of, card, licence_of, public
from zimgkit.runtime import demo_models
from zimgkit.runtime.bundles import open_bundle

BUNDLE = demo_models.locate(demo_models.DEFAULT)


@pytest.fixture
def manifest():
    return Bundle.read(BUNDLE).manifest


def typed(hub: LoopbackHub, home: Path, *words: object, token: str = "secret") -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    kept |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": token, "NO_PROXY": "*"}
    command = [sys.executable, "-m", "zimgkit.export", "push", *map(str, words)]
    return subprocess.run(command, env=kept, capture_output=True, text=True, check=False, timeout=120)


def test_a_bundle_is_uploaded_and_taken_from_there(tmp_path):
    with LoopbackHub(writer="secret") as hub:
        done = typed(hub, tmp_path, BUNDLE, "me/tiny", "--private", "--licence", "apache-2.0", "--quiet")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{hub.url}/me/tiny/commit/")
        repo = hub.repos["me/tiny"]
        assert repo.private
        files = repo.commits[repo.refs["main"]]
        own = Bundle.open(BUNDLE)
        assert files.keys() == {MANIFEST, "README.md", *own.manifest.files}
        assert all(files[name] == own.file(name).read_bytes() for name in own.manifest.files)
        assert b"license: apache-2.0\n" in files["README.md"]
        for name, data in files.items():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "copy" / name).write_bytes(data)
        assert open_bundle(tmp_path / "copy").manifest.family == own.manifest.family
        refused = typed(hub, tmp_path, BUNDLE, "me/tiny", token="other")
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
        assert "does not let you write me/tiny (401)" in refused.stderr
        for words, says in (
            (("tiny",), "'tiny' is not a repository"),
            (("a/b", "--licence", "x: y"), "is not a licence"),
        ):
            refused = typed(hub, tmp_path, BUNDLE, *words)
            assert refused.returncode == 2
            assert says in refused.stderr


def test_the_licence_of_a_checkpoint_on_the_hub(manifest, tmp_path):
    shutil.copytree(BUNDLE, tmp_path / "bundle", copy_function=os.link)
    sources = {**manifest.sources, "checkpoint": Source("me/base", "main")}
    write_manifest(tmp_path / "bundle", msgspec.structs.replace(manifest, sources=sources))
    with LoopbackHub(writer="secret") as hub:
        hub.add("me/base", {"README.md": b""})
        for base, says in (("bsd-3-clause", b"license: bsd-3-clause\n"), (None, b"license: unknown\n")):
            hub.repos["me/base"].licence = base
            done = typed(hub, tmp_path, tmp_path / "bundle", "me/tiny")
            assert done.returncode == 0, done.stderr
            assert ("--licence" in done.stderr) == (base is None)
            repo = hub.repos["me/tiny"]
            assert says in repo.commits[repo.refs["main"]]["README.md"]


def test_the_card_states_all(manifest):
    difference = Difference((0.1,), (0.998,), (0.1,), (0.99,), 31.25, 0.97)
    cost = Cost(("a", "b"), 0, 64, 64, 8, "onnxruntime", difference, difference)
    whole = msgspec.structs.replace(
        manifest,
        sources={**manifest.sources, "checkpoint": Source("Z-Image-Turbo", "abc")},
        loras=(MergedLora("/home/me/style.safetensors", "0", 0.8),),
        quantization=Quantization("int8-weights"),
        cost=cost,
    )
    text = card(whole, "me/tiny", "unknown")
    for said in (
        "license: unknown",
        "base_model: Tongyi-MAI/Z-Image-Turbo",
        "base_model_relation: quantized",
        "--bundle me/tiny",
        "| revision | `abc` |",
        "unknown: it was neither given nor found",
        "| precision | int8-weights |",
        "at least 0.99800, SSIM 0.9700, PSNR 31.2 dB (2 prompts, 64x64, 8 steps, onnxruntime)",
        "style.safetensors at 0.8",
    ):
        assert said in text, said
    assert "/home/me" not in text


def test_where_the_licence_is_read(manifest, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: []\n---\nlicense: other\n")
    local = msgspec.structs.replace(manifest, sources={**manifest.sources, "checkpoint": Source(str(tmp_path))})
    assert (licence_of(local), base_of(local)) == ("mit", "")
    (tmp_path / "README.md").write_text("no front matter\nlicense: mit\n")
    assert licence_of(local) == "unknown"


def test_places_of_files_on_this_machine_stay_here(tmp_path):
    text = json.loads((BUNDLE / MANIFEST).read_bytes())
    text["sources"]["checkpoint"]["model"] = str(tmp_path)
    text["loras"] = [{"source": "/home/me/a.safetensors", "sha256": "0", "scale": 1.0}, {"source": "a/b/c.safetensors"}]
    found = json.loads(public(json.dumps(text).encode()))
    assert found["sources"]["checkpoint"]["model"] == tmp_path.name
    assert [lora["source"] for lora in found["loras"]] == ["a.safetensors", "a/b/c.safetensors"]
    assert {key: found[key] for key in found if key not in ("sources", "loras")} == {
        key: text[key] for key in text if key not in ("sources", "loras")
    }
