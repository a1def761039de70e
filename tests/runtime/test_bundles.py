"""Bundles on a hub: fetched by the real clients, in processes of their own, from one on the loopback address."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from tests.runtime.loopback_hub import Break, LoopbackHub
from tests.runtime.test_hub import Client
from zimgkit.engines.bundle import MANIFEST, Bundle, CompiledEngine, FileRecord
from zimgkit.runtime import demo_models
from zimgkit.runtime.bundles import needed, place_of
from zimgkit.runtime.pipeline import Pipeline

SERVE = """
import json, sys
sys.modules["torch"] = None
from zimgkit.engines.errors import ZimgError
from zimgkit.runtime.bundles import open_bundle
from zimgkit.runtime.pipeline import Pipeline
for line in sys.stdin:
    arguments = json.loads(line)
    picture = arguments.pop("picture", None)
    try:
        bundle = open_bundle(**arguments)
        reply = dict(root=str(bundle.root), files=sorted(bundle.names))
        if picture:
            with Pipeline.open(arguments["bundle"], device="cpu") as pipeline:
                result = pipeline("a red circle", height=32, width=32, num_inference_steps=1, seed=0)
            result.images[0].save(picture)
    except ZimgError as error:
        reply = dict(error=str(error), kind=type(error).__name__)
    print(json.dumps(reply), flush=True)
"""
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """A bundle that zimgkit carries, as files on a hub, with others beside them."""
    bundle = Bundle.open(demo_models.locate(demo_models.DEFAULT), verify=False)
    found = {name: bundle.file(name).read_bytes() for name in bundle.manifest.files}
    return found | {
        MANIFEST: (bundle.root / MANIFEST).read_bytes(),
        "README.md": b"card",
        "other.safetensors": b"x" * 99,
    }


@pytest.fixture(scope="module")
def hub(files: dict[str, bytes]) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        server.add("me/tiny", files, refs=("main", "master", "v1"))
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub: LoopbackHub, home: Path) -> Iterator[Client]:
    with Client(home, hub.url, SERVE) as process:
        yield process


def refused(reply: dict[str, Any], *messages: str) -> None:
    assert "error" in reply, reply
    assert "\n" not in reply["error"]
    for message in messages:
        assert message in reply["error"], reply


def test_it_is_fetched_once_and_draws_as_a_local_one(client, hub, home, files, tmp_path):
    reply = client.ask({"bundle": "me/tiny", "picture": str(tmp_path / "a.png")})
    assert "error" not in reply, reply
    root = Path(reply["root"])
    assert sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()) == sorted(
        [MANIFEST, *reply["files"]]
    )
    assert not hub.fetched("README.md")
    assert not hub.fetched("other.safetensors")
    assert len(hub.fetched(WEIGHTS)) == 1
    with Pipeline.open(demo_models.DEFAULT, device="cpu") as pipeline:
        expected = pipeline("a red circle", height=32, width=32, num_inference_steps=1, seed=0).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(expected))
    assert client.ask({"bundle": "me/tiny@v1"})["root"] == reply["root"]
    assert len(hub.fetched(WEIGHTS)) == 1
    with Client(home, hub.url, SERVE, HF_HUB_OFFLINE="1") as offline:
        assert offline.ask({"bundle": "me/tiny"})["root"] == reply["root"]
        refused(offline.ask({"bundle": "me/none"}), "me/none is not in the cache", "HF_HUB_OFFLINE is set")


def test_what_a_hub_does_not_give(client, hub, files):
    refused(client.ask({"bundle": "me/none"}), "there is no folder me/none, and Hugging Face has no model me/none")
    refused(client.ask({"bundle": "me/tiny@v9"}), "has no revision 'v9' of me/tiny")
    hub.add("me/private", files)
    hub.repos["me/private"].token = "secret"
    refused(client.ask({"bundle": "me/private"}), "does not let you read it (401)", "hf auth login")
    hub.add("me/checkpoint", {"model_index.json": b"{}"})
    refused(
        client.ask({"bundle": "me/checkpoint"}), "me/checkpoint is not a bundle: it has no bundle.json", "build --model"
    )


def test_wrong_content(client, hub, files):
    changed = bytearray(files[WEIGHTS])
    changed[-5] ^= 1
    hub.add("me/changed", files | {WEIGHTS: bytes(changed)})
    refused(client.ask({"bundle": "me/changed"}), "its hash is not the manifest's")
    hub.add("me/short", files | {WEIGHTS: files[WEIGHTS][:-1]})
    refused(client.ask({"bundle": "me/short"}), "bytes")
    hub.add("me/lacking", {name: data for name, data in files.items() if name != WEIGHTS})
    refused(client.ask({"bundle": "me/lacking"}), f"lacks {WEIGHTS!r}", "not uploaded whole")
    hub.add("me/nothing", files | {MANIFEST: b"[1, 2"})
    refused(client.ask({"bundle": "me/nothing"}), "is not a manifest zimgkit can read")


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/hostname", "a/../../b", "*"])
def test_names_that_leave_the_folder(client, hub, files, name):
    manifest = json.loads(files[MANIFEST])
    manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
    hub.add("me/leaves", files | {MANIFEST: json.dumps(manifest).encode()})
    refused(client.ask({"bundle": "me/leaves"}), name)


def test_a_download_that_breaks_is_taken_up_again(client, hub, files):
    hub.add("me/broken", files | {"x.txt": b""})
    hub.breaks[WEIGHTS] = Break(after=len(files[WEIGHTS]) // 2, times=1)
    with Client(client_home := Path(client.env["HF_HOME"]).parent / "other", hub.url, SERVE) as other:
        before = sum(request.sent for request in hub.fetched(WEIGHTS))
        reply = other.ask({"bundle": "me/broken"})
        if "error" in reply:
            reply = other.ask({"bundle": "me/broken"})
        assert "error" not in reply, reply
        assert Path(reply["root"]).is_relative_to(client_home)
    # Whatever was whole stays: what broke is fetched once more, at the most from its beginning.
    assert sum(request.sent for request in hub.fetched(WEIGHTS)) - before <= 1.5 * len(files[WEIGHTS])


def test_modelscope(client):
    reply = client.ask({"bundle": "modelscope:me/tiny"})
    assert "error" not in reply, reply
    assert not (Path(reply["root"]) / "README.md").exists()


def test_paths_and_places_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert place_of("owner/name") == ("owner/name", "huggingface", None)
    assert place_of("owner/name@refs/pr/3") == ("owner/name", "huggingface", "refs/pr/3")
    assert place_of("modelscope:owner/name@v1") == ("owner/name", "modelscope", "v1")
    for path in ("name", "./owner/name", "../owner/name", "/owner/name", "a/b/c", "owner/", "~/name", ""):
        assert place_of(path) is None, path
    (tmp_path / "owner").mkdir()
    assert place_of("owner/name") is None  # Misspelt, more likely.
    assert place_of("owner/name@main") is not None
    (tmp_path / "owner" / "name@main").mkdir()
    assert place_of("owner/name@main") is None


def test_what_a_backend_needs():
    manifest = Bundle.read(demo_models.locate(demo_models.DEFAULT)).manifest
    component = msgspec.structs.replace(manifest.components["denoiser"], base="denoiser.base.safetensors")
    engine = CompiledEngine("denoiser", "engines/a/x.plan", "tensorrt", "tensorrt", "10", "sm90", "s", ())
    files = {name: FileRecord(1, "0") for name in ("denoiser.base.safetensors", "engines/a/x.plan")}
    whole = msgspec.structs.replace(
        manifest,
        components=manifest.components | {"denoiser": component},
        engines=(engine,),
        files=manifest.files | files,
    )
    assert set(needed(whole, "onnxruntime")) == set(manifest.files)
    assert set(needed(whole, "tensorrt")) == {*manifest.files, "engines/a/x.plan"}
