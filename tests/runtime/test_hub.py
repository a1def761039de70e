"""Fetching with the real clients, each in its own process, from a small hub on the loopback address."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.loopback_hub import Break, LoopbackHub
from zimgkit.engines.errors import DownloadError, UsageError, install
from zimgkit.export.checkpoints.checkpoint import FILES
from zimgkit.runtime import hub as hub_module

SHARD = "transformer/diffusion_pytorch_model.safetensors"
SERVE = """
import json, sys
sys.modules["torch"] = None  # modelscope imports it where it can, which takes seconds
from zimgkit.engines.errors import ZimgError
from zimgkit.export.checkpoints.checkpoint import open_checkpoint, open_configs
from zimgkit.runtime.hub import fetch
for line in sys.stdin:
    arguments = json.loads(line)
    try:
        if "model" in arguments:
            opened = (open_configs if arguments.pop("configs", False) else open_checkpoint)(**arguments)
            reply = dict(root=str(opened.root), name=opened.name, revision=opened.source.revision)
            reply["files"] = sorted(opened.source.files)
        else:
            reply = dict(root=str(fetch(**arguments)))
    except ZimgError as error:
        reply = dict(error=str(error), kind=type(error).__name__)
    print(json.dumps(reply), flush=True)
"""


def files_of(seed: int, size: int = 50_000) -> dict[str, bytes]:
    """A repository: what a build needs, and what it does not."""
    data = np.random.default_rng(seed).bytes(size)
    needed = {
        "model_index.json": b'{"_class_name": "ZImagePipeline"}',
        "scheduler/scheduler_config.json": b'{"shift": 3.0}',
        "tokenizer/tokenizer.json": b"{}",
        "tokenizer/merges.txt": b"",
        "tokenizer/vocab.json": b"{}",
        "text_encoder/config.json": b"{}",
        "text_encoder/model-00001-of-00002.safetensors": data[:1000] + b"1",
        "text_encoder/model-00002-of-00002.safetensors": data[:1000] + b"2",
        "text_encoder/model.safetensors.index.json": b"{}",
        "transformer/config.json": b'{"n": %d}' % seed,
        SHARD: data,
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": data[:1000] + b"3",
    }
    assert len(needed) == 13
    return needed | {
        "README.md": b"read me",
        "assets/picture.png": b"picture",
        "processor/tokenizer.json": b"{}",
        "text_encoder/pytorch_model.bin": b"pickle",
        "tokenizer/model.pt": b"pickle",
        "transformer/diffusion_pytorch_model.bin": b"pickle",
        "transformer/diffusion_pytorch_model.fp16.safetensors": b"second copy",
        "unet/diffusion_pytorch_model.safetensors": b"stray",
    }


def wanted(files: dict[str, bytes]) -> dict[str, bytes]:
    return dict(list(files.items())[:13])


def on_disk(root: str) -> dict[str, bytes]:
    folder = Path(root)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Client:
    """A process in which a hub's client runs, with an environment of its own."""

    def __init__(self, home: Path, url: str, script: str = SERVE, **more: str) -> None:
        self.script = script
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MODELSCOPE_"))}
        self.env = kept | {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home / "hf"),
            "MODELSCOPE_ENDPOINT": url,
            "MODELSCOPE_CACHE": str(home / "ms"),
            "MODELSCOPE_HOME": str(home / "ms-home"),
            "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0",
            "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
            "MODELSCOPE_API_MAX_RETRIES": "1",
            "NO_PROXY": "*",
            "OMP_NUM_THREADS": "1",
        }
        self.env |= more

    def __enter__(self) -> Client:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.script],
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def fetch(self, model_id: str, **arguments: Any) -> dict[str, Any]:
        return self.ask({"model_id": model_id, "allow": FILES} | arguments)

    def ask(self, arguments: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        reply: dict[str, Any] = json.loads(self.process.stdout.readline())
        return reply


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub: LoopbackHub, home: Path) -> Iterator[Client]:
    with Client(home, hub.url) as opened:
        yield opened


def one_line(reply: dict[str, Any], *parts: str, kind: str = "DownloadError") -> None:
    assert reply.get("kind") == kind, reply
    assert "\n" not in reply["error"]
    for part in parts:
        assert part in reply["error"]


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
class TestBothHubs:
    def test_only_what_a_build_needs_is_fetched(self, hub: LoopbackHub, client: Client, source: str) -> None:
        files = files_of(1)
        hub.add(f"a/needed-{source}", files)
        hub.requests.clear()
        assert on_disk(client.fetch(f"a/needed-{source}", source=source)["root"]) == wanted(files)
        asked = {request.path for request in hub.requests}
        assert asked.isdisjoint(files.keys() - wanted(files).keys())
        assert not any("bin" in path for path in asked)

    def test_a_second_run_uses_the_cache(self, hub: LoopbackHub, client: Client, home: Path, source: str) -> None:
        files = files_of(2)
        hub.add(f"a/cached-{source}", files)
        first = client.fetch(f"a/cached-{source}", source=source)
        hub.requests.clear()
        with Client(home, hub.url) as second:
            assert second.fetch(f"a/cached-{source}", source=source) == first
        assert not [request for request in hub.requests if request.path in files]
        assert sum(request.sent for request in hub.requests) < 20_000
        assert on_disk(first["root"]) == wanted(files)

    def test_the_cache_serves_without_a_hub(self, hub: LoopbackHub, client: Client, home: Path, source: str) -> None:
        files = files_of(3)
        hub.add(f"a/gone-{source}", files)
        first = client.fetch(f"a/gone-{source}", source=source)
        with Client(home, "http://127.0.0.1:9") as cut_off:
            assert cut_off.fetch(f"a/gone-{source}", source=source) == first
            one_line(
                cut_off.fetch("a/never-seen", source=source), "cannot be reached, and a/never-seen is not in the cache"
            )

    def test_a_new_commit_is_fetched_and_an_old_one_can_be_asked_for(
        self, hub: LoopbackHub, client: Client, source: str
    ) -> None:
        old, new = files_of(4), files_of(5)
        commit = hub.add(f"a/moving-{source}", old, refs=("main", "master", "v1"))
        hub.add(f"a/moving-{source}", new)
        read = [
            on_disk(client.fetch(f"a/moving-{source}", source=source, revision=r)["root"]) for r in (None, "v1", commit)
        ]
        assert read == [wanted(new), wanted(old), wanted(old)]

    def test_no_such_model(self, client: Client, source: str) -> None:
        one_line(client.fetch("a/no-such-model", source=source), "has no model a/no-such-model", "login")

    def test_no_such_revision(self, hub: LoopbackHub, client: Client, source: str) -> None:
        hub.add(f"a/revised-{source}", files_of(6))
        reply = client.fetch(f"a/revised-{source}", source=source, revision="v9")
        one_line(reply, "has no revision 'v9'")

    def test_too_little_space(self, hub: LoopbackHub, client: Client, source: str) -> None:
        name = f"a/huge-{source}"
        files = files_of(7)
        hub.add(name, files)
        hub.repos[name].claimed_size = 10**15
        hub.requests.clear()
        one_line(client.fetch(name, source=source), "takes 4,000,000.0 GB", "free some space")
        assert not [request for request in hub.requests if request.path in files]

    def test_a_reset_connection_is_an_error_and_a_second_call_goes_on(
        self, hub: LoopbackHub, client: Client, source: str
    ) -> None:
        name, files = f"a/reset-{source}", files_of(8 if source == "huggingface" else 9, 6_000_000)
        hub.add(name, files)
        hub.breaks[SHARD] = Break(after=4_000_000, reset=True)
        one_line(client.fetch(name, source=source), "broke off", "run the same command again")
        hub.requests.clear()
        assert on_disk(client.fetch(name, source=source)["root"]) == wanted(files)
        # What was complete is not fetched again: how much that is depends on threads. Of the broken file, ModelScope's
        # client keeps the part it has.
        fetched_again = {request.path for request in hub.requests if request.path in files}
        assert SHARD in fetched_again
        assert fetched_again < files.keys()
        if source == "modelscope":
            (request,) = hub.fetched(SHARD)
            assert request.range and request.status == 206 and request.sent < len(files[SHARD])

    def test_a_hub_out_of_order(self, hub: LoopbackHub, client: Client, source: str) -> None:
        hub.status = 503
        try:
            reply = client.fetch("a/anything", source=source)
        finally:
            hub.status = None
        one_line(reply, "answered 503 when asked for a/anything", "again")


class TestHuggingFace:
    def test_a_connection_that_ends_early_is_resumed_where_it_ended(self, hub: LoopbackHub, client: Client) -> None:
        # The client writes pieces of 10 MiB, so that the second of them is lost with the connection.
        files = files_of(10, 24 << 20)
        hub.add("a/broken", files)
        hub.breaks[SHARD] = Break(after=15 << 20)
        hub.requests.clear()
        assert on_disk(client.fetch("a/broken")["root"]) == wanted(files)
        ranges = [request.range for request in hub.fetched(SHARD)]
        assert ranges == [None, f"bytes={10 << 20}-"]

    def test_what_is_cached_needs_no_space(self, hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
        files = files_of(16)
        changed = files | {"transformer/config.json": b"{}"}
        hub.add("a/small-change", files)
        with Client(tmp_path, hub.url, HF_HUB_DISABLE_SYMLINKS="1") as linkless:
            for each in (client, linkless):
                each.fetch("a/small-change")
            hub.repos["a/small-change"].claimed_size = 10**15
            assert on_disk(linkless.fetch("a/small-change")["root"]) == wanted(files)
        hub.add("a/small-change", changed)
        assert on_disk(client.fetch("a/small-change")["root"]) == wanted(changed)

    def test_offline_mode(self, hub: LoopbackHub, client: Client, home: Path) -> None:
        hub.add("a/offline", files_of(11))
        first = client.fetch("a/offline")
        hub.requests.clear()
        with Client(home, hub.url, HF_HUB_OFFLINE="1") as offline:
            assert offline.fetch("a/offline") == first
            one_line(offline.fetch("a/not-cached"), "a/not-cached is not in the cache", "unset HF_HUB_OFFLINE")
            one_line(offline.fetch("a/offline", revision="v2"), "HF_HUB_OFFLINE is set")
        assert hub.requests == []

    def test_private_and_gated_models(self, hub: LoopbackHub, client: Client, home: Path) -> None:
        files = files_of(12)
        hub.add("a/private", files)
        hub.add("a/gated", files_of(13))
        hub.repos["a/private"].token, hub.repos["a/gated"].gated = "hf_secret", True
        one_line(client.fetch("a/private"), "a/private", "or does not let you read it (401)", "hf auth login")
        one_line(client.fetch("a/gated"), "does not let you read a/gated (403)", "hf auth login")
        hub.requests.clear()
        with Client(home, hub.url, HF_TOKEN="hf_secret") as known:
            assert on_disk(known.fetch("a/private")["root"]) == wanted(files)
        # The store is another host, which must not learn the token.
        assert {request.token for request in hub.fetched(SHARD)} == {None}

    def test_what_is_no_model_id(self, client: Client) -> None:
        one_line(client.fetch("a--b/c"), "'a--b/c' is not a model id")


class TestOpenCheckpoint:
    """Through ``open_checkpoint``, for the order in which things are asked for."""

    def test_a_model_of_another_family_costs_one_small_file(self, hub: LoopbackHub, client: Client) -> None:
        files = files_of(14) | {"model_index.json": b'{"_class_name": "FluxPipeline"}'}
        hub.add("a/other", files)
        hub.requests.clear()
        one_line(client.ask({"model": "a/other"}), "FluxPipeline", "zimgkit serves", kind="CheckpointError")
        assert {request.path for request in hub.requests if request.path in files} == {"model_index.json"}

    def test_a_model_in_another_layout(self, hub: LoopbackHub, client: Client) -> None:
        hub.add("a/comfy", {"split_files/model.safetensors": b"data"})
        one_line(
            client.ask({"model": "a/comfy"}), "has no model_index.json", "diffusers layout", kind="CheckpointError"
        )

    @pytest.mark.parametrize("source", ["huggingface", "modelscope"])
    def test_a_short_name_opens_the_catalogs_model(self, hub: LoopbackHub, client: Client, source: str) -> None:
        shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        index = json.dumps({"weight_map": shards}).encode()
        files = files_of(15) | {"text_encoder/model.safetensors.index.json": index}
        commit = hub.add("Tongyi-MAI/Z-Image-Turbo", files)
        hub.requests.clear()
        known = client.ask({"model": "z-image-turbo", "source": source, "configs": True})
        assert known["files"] == []
        assert not [request for request in hub.requests if request.path.endswith(".safetensors")]
        opened = client.ask({"model": "z-image-turbo", "source": source})
        revision = commit if source == "huggingface" else "master"
        assert (opened["name"], opened["revision"]) == ("Z-Image-Turbo", revision)
        assert opened["root"] == known["root"]
        assert opened["files"] == [path for path in sorted(wanted(files)) if path.endswith(".safetensors")]
        # The cache names the model, too, when its folder is opened as a local one.
        assert client.ask({"model": opened["root"]}) == opened


def test_an_unknown_source() -> None:
    with pytest.raises(UsageError, match=r"'gitlab'.*huggingface, modelscope"):
        hub_module.fetch("a/b", source="gitlab", allow=FILES)


def test_modelscope_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    with pytest.raises(DownloadError, match=re.escape(install("modelscope"))):
        hub_module.fetch("a/b", source="modelscope", allow=FILES)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"the disk was full .* set HF_HOME"),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), r"the disk was full"),
        (PermissionError(errno.EACCES, "Permission denied"), r"the cache of Hugging Face cannot be written"),
        (RuntimeError("first\nsecond"), r"broke off \(RuntimeError: first\); run the same command again"),
        (RuntimeError(), r"broke off \(RuntimeError\)"),
    ],
)
def test_errors_of_the_machine(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "HfApi", fail)
    with pytest.raises(DownloadError, match=message) as caught:
        hub_module.fetch("a/b", allow=FILES)
    assert "\n" not in str(caught.value)
