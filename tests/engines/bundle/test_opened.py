"""The bundle on disk: written whole or not at all, and refused where it is not what its manifest says."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import handmade
from zimgkit.engines.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    Bundle,
    Component,
    Defaults,
    FileRecord,
    Manifest,
    Source,
    TensorSpec,
    TextConfig,
    atomic_folder,
    record_files,
    sha256,
    verified,
    write_manifest,
)
from zimgkit.engines.errors import BundleError, OutputError
from zimgkit.engines.tensors import safetensors

FILES = {"net.safetensors": bytes(range(200)), "net.onnx": b"graph", "tokenizer/tokenizer.json": b"{}"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What one test hashed is new to the next."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return handmade.write_bundle(tmp_path / "bundle", FILES)


def edit(root: Path, **changes: Any) -> None:
    """Change the manifest as text, into what our own writer would never write."""
    path = root / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def listed(name: str, content: bytes = b"") -> dict[str, Any]:
    return {name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}


def refused(path: Path, **options: Any) -> str:
    """The one line that a bundle is refused with."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_one_byte(path: Path, *, keep_times: bool = False) -> None:
    """Change a byte in place: same size, same inode, and as one likes the same time of change."""
    before = path.stat()
    with path.open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def wait_for_the_clock(folder: Path) -> None:
    """Return when the file system's clock has moved on; it ticks every few milliseconds."""
    probe = folder / "probe"
    probe.touch()
    before = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == before:
        probe.touch()
    probe.unlink()


class TestManifest:
    def test_round_trip(self, tmp_path: Path) -> None:
        component = Component(
            weights=("a.safetensors", "b.safetensors"),
            graphs={"bfloat16": "net.onnx", "float32": "net.float32.onnx"},
            inputs={"x": TensorSpec("float32", (1, "tokens", 64)), "ids": TensorSpec("int64", ())},
            outputs={"y": TensorSpec("float32", ("tokens",))},
            parameters=2**40,
            weight_bytes=2**41,
        )
        written = Manifest(
            schema_version=SCHEMA_VERSION,
            zimgkit_version="1.2.3",
            tasks=("text-to-image",),
            family="z-image",
            name="名",
            precision="bfloat16",
            sources={"checkpoint": Source("owner/model", "0123abc", {"a/b.safetensors": 7})},
            text=TextConfig('<|im_start|>\n"', "é", 34, 1058, 512),
            defaults=Defaults(8, 0.0, 1024, 1328, " "),
            scheduler={"shift": 3.0, "nested": {"list": [1, None, True]}},
            config={"vae": {"latents_mean": [0.1, -0.75]}},
            components={"net": component, "table": Component(("c.safetensors",), tensors=("t",))},
            files={"net.onnx": FileRecord(5, "00")},
            tools={"torch": "2.13"},
        )
        write_manifest(tmp_path, written)
        (tmp_path / "net.onnx").touch()
        assert Bundle.open(tmp_path, verify=False).manifest == written
        assert '\n "zimgkit_version": "1.2.3"' in (tmp_path / MANIFEST).read_text()  # For people.

    def test_records_are_of_every_file_but_the_manifest(self, root: Path) -> None:
        records = record_files(root)
        assert records == {
            name: FileRecord(len(content), hashlib.sha256(content).hexdigest()) for name, content in FILES.items()
        }
        assert list(records) == sorted(FILES)

    @pytest.mark.parametrize("size", [0, 1, (16 << 20) - 1, (16 << 20) + 1])
    def test_hashes_are_sha256(self, tmp_path: Path, size: int) -> None:
        content = np.random.default_rng(0).bytes(size)
        (tmp_path / "a").write_bytes(content)
        assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


class TestOpen:
    def test_files_are_found_and_checked(self, root: Path) -> None:
        bundle = Bundle.open(root)
        assert bundle.root == root.resolve()
        assert {name: bundle.file(name).read_bytes() for name in FILES} == FILES

    def test_a_folder_by_another_path(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "link").symlink_to(root)
        monkeypatch.chdir(tmp_path)
        for path in ("bundle", "link", "./bundle/../link/", str(root), root):
            assert Bundle.open(path).root == root.resolve()

    def test_weights_may_be_hard_links_and_links_within(self, root: Path, tmp_path: Path) -> None:
        (root / "net.safetensors").unlink()
        (tmp_path / "checkpoint").write_bytes(FILES["net.safetensors"])
        (root / "net.safetensors").hardlink_to(tmp_path / "checkpoint")
        (root / "net.onnx").rename(root / "graph")
        (root / "net.onnx").symlink_to("graph")
        assert Bundle.open(root).file("net.onnx").read_bytes() == b"graph"

    @pytest.mark.parametrize("name", ["nowhere", "file", "empty"])
    def test_no_bundle(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "empty").mkdir()
        message = refused(tmp_path / name)
        assert message.startswith(
            f"{tmp_path / name} is not a bundle: it has no bundle.json; make one with: zimg-export build"
        )

    def test_what_makes_one_of_what_was_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert refused(Path("a/Z-Model")).endswith("zimg-export build --model a/Z-Model --out z-model-bundle")
        checkpoint = tmp_path / "my model"
        checkpoint.mkdir()
        (checkpoint / "model_index.json").write_text("{}")
        assert refused(Path("my model")).endswith("zimg-export build --model 'my model' --out 'my model-bundle'")
        assert refused(tmp_path).endswith("zimg-export build --model MODEL --out BUNDLE")

    def test_the_manifest_is_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / MANIFEST).mkdir()
        assert "bundle.json cannot be read (Is a directory)" in refused(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"name": "\xff"}', b'{"name": "\\ud800"}', b'{"schema_version": 1}',
         b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"],
        ids=["empty", "cut", "list", "null", "binary", "not UTF-8", "half a character", "fields missing", "deep"],
    )  # fmt: skip
    def test_malformed_manifests(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / MANIFEST).write_bytes(content)
        assert re.search(
            r"bundle\.json is not a manifest zimgkit can read \(.+\); build the bundle again", refused(tmp_path)
        )

    @pytest.mark.parametrize(
        "changes",
        [
            {"schema_version": None}, {"schema_version": "1"}, {"schema_version": True}, {"schema_version": 0.5},
            {"name": 5}, {"files": []}, {"files": {"net.onnx": 5}},
            {"files": {"net.onnx": {"size": "5", "sha256": ""}}},
            {"components": {"net": {}}}, {"components": {"net": {"weights": "net.safetensors"}}},
            {"components": {"net": {"weights": [], "inputs": {"x": {"dtype": "float32", "shape": [1.5]}}}}},
            {"sources": {}}, {"sources": {"lora": {"model": "x"}}}, {"tasks": "text-to-image"},
            {"text": {"prefix": ""}}, {"defaults": {"num_inference_steps": 9.5}}, {"config": {"vae": 3}},
        ],
        ids=str,
    )  # fmt: skip
    def test_wrong_types(self, root: Path, changes: dict[str, Any]) -> None:
        edit(root, **changes)
        assert "is not a manifest zimgkit can read (" in refused(root)

    @pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 10**30, SCHEMA_VERSION + 0.5])
    @pytest.mark.parametrize("rest", [{}, {"components": "in another form", "files": None}])
    def test_newer_schema(self, root: Path, version: float, rest: dict[str, Any]) -> None:
        edit(root, schema_version=version, **rest)
        message = refused(root)
        assert (
            f"has schema version {version}, and this zimgkit reads up to {SCHEMA_VERSION}; upgrade zimgkit" in message
        )

    def test_what_a_later_version_added_is_passed_over(self, root: Path) -> None:
        edit(root, quality={"psnr": 40.0})
        Bundle.open(root)

    def test_unknown_component(self, root: Path) -> None:
        with pytest.raises(BundleError, match="has no component 'denoiser', only net"):
            Bundle.open(root).component("denoiser")

    def test_unlisted_file(self, root: Path) -> None:
        (root / "stray.bin").touch()
        bundle = Bundle.open(root)
        with pytest.raises(BundleError, match=r"does not list 'stray\.bin'; build the bundle again"):
            bundle.file("stray.bin")


class TestPaths:
    """Names in a manifest never lead out of its folder."""

    @pytest.mark.parametrize(
        "name",
        ["../secret", "/etc/passwd", "a/../../secret", "tokenizer/../../secret", "..", "tokenizer/..", "..\\secret",
         "tokenizer\\..\\..\\secret", "//etc/passwd"],
    )  # fmt: skip
    @pytest.mark.parametrize("verify", [True, False])
    def test_names_that_lead_out(self, root: Path, tmp_path: Path, name: str, verify: bool) -> None:
        (tmp_path / "secret").write_bytes(b"")
        edit(root, files=listed(name))
        message = refused(root, verify=verify)
        assert message.endswith(f"names {name!r}, which leads out of the bundle; do not trust it")
        with pytest.raises(BundleError, match="leads out of the bundle"):
            Bundle(root.resolve(), handmade.manifest()).file(name)

    def test_links_in_a_circle(self, root: Path) -> None:
        (root / "a").symlink_to("b")
        (root / "b").symlink_to("a")
        edit(root, files=listed("a"))
        assert re.search(r"names 'a', which cannot be opened|bundle/a is missing", refused(root))

    @pytest.mark.parametrize("name", ["a\0b", "n" * 300])
    def test_names_no_file_can_have(self, root: Path, name: str) -> None:
        edit(root, files=listed(name))
        assert f"names {name!r}, which cannot be opened" in refused(root)

    @pytest.mark.parametrize("name", ["", ".", "tokenizer", "nothing"])
    def test_names_of_no_file(self, root: Path, name: str) -> None:
        edit(root, files=listed(name))
        assert "is missing; copy or build the bundle again" in refused(root)


class TestVerify:
    @pytest.mark.parametrize("verify", [True, False])
    def test_missing(self, root: Path, verify: bool) -> None:
        (root / "net.onnx").unlink()
        assert refused(root, verify=verify).endswith("net.onnx is missing; copy or build the bundle again")

    @pytest.mark.parametrize("content", [b"", b"grap", b"graphs"])
    def test_another_size(self, root: Path, content: bytes) -> None:
        (root / "net.onnx").write_bytes(content)
        assert f"net.onnx has {len(content)} of 5 bytes; copy or build the bundle again" in refused(root)
        Bundle.open(root, verify=False)

    @pytest.mark.parametrize("name", FILES)
    def test_a_changed_byte(self, root: Path, name: str) -> None:
        change_one_byte(root / name)
        assert f"{name} was changed: its hash is not the manifest's; copy or build the bundle again" in refused(root)
        assert "was changed" in refused(root)  # And is not taken for known afterwards.

    @pytest.mark.parametrize("keep_times", [False, True])
    def test_a_byte_changed_after_the_first_opening(self, root: Path, keep_times: bool) -> None:
        Bundle.open(root)
        wait_for_the_clock(root)
        change_one_byte(root / "net.safetensors", keep_times=keep_times)
        assert "net.safetensors was changed" in refused(root)

    def test_another_file_in_its_place(self, root: Path) -> None:
        Bundle.open(root)
        before = (root / "net.onnx").stat()
        (root / "other").write_bytes(b"GRAPH")
        (root / "other").replace(root / "net.onnx")
        os.utime(root / "net.onnx", ns=(before.st_atime_ns, before.st_mtime_ns))
        assert "net.onnx was changed" in refused(root)

    def test_bytes_are_hashed_once(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hashed: list[str] = []

        def count(path: Path, *_: object) -> str:
            hashed.append(path.name)
            return sha256(path)

        monkeypatch.setattr("zimgkit.engines.bundle.verified.sha256", count)
        bundle = Bundle.open(root)
        assert sorted(hashed) == ["net.onnx", "net.safetensors", "tokenizer.json"]
        Bundle.open(root)
        assert len(hashed) == 3
        os.utime(root / "net.onnx", ns=(0, 0))
        Bundle.open(root)
        assert hashed[3:] == ["net.onnx"]
        bundle.verify(afresh=True)
        assert len(hashed) == 7

    def test_afresh_trusts_no_note(self, root: Path) -> None:
        bundle = Bundle.open(root)
        change_one_byte(root / "net.onnx")
        # As if the change were older than the file system's clock can tell.
        verified.remember(root / "net.onnx", hashlib.sha256(b"graph").hexdigest(), verified.state(root / "net.onnx"))
        Bundle.open(root)
        with pytest.raises(BundleError, match=r"net\.onnx was changed"):
            bundle.verify(afresh=True)

    def test_a_file_that_changes_while_it_is_hashed_is_not_known(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def slow(path: Path, *_: object) -> str:
            digest = sha256(path)
            if path.name == "net.onnx":
                wait_for_the_clock(root)
                change_one_byte(path)
            return digest

        with monkeypatch.context() as patch:
            patch.setattr("zimgkit.engines.bundle.verified.sha256", slow)
            Bundle.open(root)
        assert "was changed" in refused(root)


class TestTensors:
    def test_a_component_has_the_tensors_of_its_files(self, tmp_path: Path) -> None:
        root = tmp_path / "bundle"
        root.mkdir()
        infos = {}
        for file, names in {"x.safetensors": "ab", "y.safetensors": "c"}.items():
            infos |= safetensors.write(
                root / file, dict.fromkeys(names, ("int64", (2,))), {name: [np.arange(2)] for name in names}
            )
        files = {path.name: path.read_bytes() for path in root.iterdir()}
        components = {"both": Component(("x.safetensors", "y.safetensors")), "one": Component(("y.safetensors",))}
        bundle = Bundle.open(handmade.write_bundle(root, files, components=components))
        assert bundle.tensors("both") == infos
        assert bundle.tensors("one") == {"c": infos["c"]}

    def test_broken_weights(self, root: Path) -> None:
        with pytest.raises(safetensors.SafetensorsError, match=r"net\.safetensors is no safetensors file"):
            Bundle.open(root).tensors("net")

    def test_content_hash_follows_the_weights_alone(self, tmp_path: Path) -> None:
        def content_hash(folder: str, *, graph: bytes = b"graph", **weights: bytes) -> str:
            files = {f"{name}.safetensors": content for name, content in weights.items()} | {"net.onnx": graph}
            return Bundle.open(handmade.write_bundle(tmp_path / folder, files, name=folder)).content_hash("net")

        first = content_hash("1", a=b"one", b=b"two")
        assert re.fullmatch("[0-9a-f]{64}", first)
        assert content_hash("2", a=b"one", b=b"two", graph=b"another") == first
        others = [content_hash("3", a=b"one"), content_hash("4", a=b"one", b=b"twO"), content_hash("5", a=b"onetwo")]
        assert len({first, *others}) == 4


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def disk_full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestAtomicFolder:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Where the targets go; the cache is elsewhere."""
        (tmp_path / "out").mkdir()
        return tmp_path / "out"

    def test_it_appears_whole_or_not_at_all(self, folder: Path) -> None:
        with atomic_folder(folder / "target") as work:
            assert work.parent == folder
            (work / "file").write_text("content")
            assert not (folder / "target").exists()
        assert names_in(folder) == ["target"]
        assert (folder / "target" / "file").read_text() == "content"

    def test_it_has_the_rights_of_any_new_folder(self, folder: Path) -> None:
        (folder / "plain").mkdir()
        with atomic_folder(folder / "target"):
            pass
        assert (folder / "target").stat().st_mode == (folder / "plain").stat().st_mode

    @pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), SystemExit(1), BundleError("bad")])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_an_exception_leaves_nothing(self, folder: Path, error: BaseException, overwrite: bool) -> None:
        with pytest.raises(type(error)) as caught, atomic_folder(folder / "target", overwrite=overwrite) as work:
            (work / "file").write_text("half")
            raise error
        assert caught.value is error
        assert names_in(folder) == []

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk(self, folder: Path, code: int) -> None:
        with pytest.raises(OutputError) as caught, atomic_folder(folder / "target") as work:
            (work / "file").write_text("half")
            raise OSError(code, os.strerror(code))
        expected = f"{folder / 'target'} cannot be written ({os.strerror(code)})"
        assert str(caught.value) == f"{expected}; free some space, or name a folder on another disk"
        assert names_in(folder) == []

    def test_another_failure_to_write_says_of_which_file(self, folder: Path) -> None:
        message = r"cannot be written \(No such file or directory: .*missing/file\)"
        with pytest.raises(OutputError, match=message), atomic_folder(folder / "target") as work:
            (work / "missing" / "file").write_text("")
        assert names_in(folder) == []

    def test_parents_are_made_and_unmade(self, folder: Path) -> None:
        with atomic_folder(folder / "a" / "b" / "target"):
            pass
        assert (folder / "a" / "b" / "target").is_dir()
        with pytest.raises(RuntimeError), atomic_folder(folder / "a" / "c" / "d" / "target"):
            raise RuntimeError
        assert names_in(folder / "a") == ["b"]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_file_is_never_replaced(self, folder: Path, overwrite: bool) -> None:
        (folder / "target").write_text("mine")
        self.refused(folder / "target", overwrite, r"exists and has no bundle.json; name another folder")
        assert (folder / "target").read_text() == "mine"

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_folder_of_other_things_is_never_replaced(self, folder: Path, overwrite: bool) -> None:
        (folder / "target").mkdir()
        (folder / "target" / "thesis.tex").write_text("mine")
        self.refused(folder / "target", overwrite, r"exists and has no bundle.json; name another folder")
        assert (folder / "target" / "thesis.tex").read_text() == "mine"

    @pytest.mark.parametrize("is_bundle", [True, False])
    def test_bundles_and_empty_folders_are_replaced_on_demand_only(self, folder: Path, is_bundle: bool) -> None:
        (folder / "target").mkdir()
        if is_bundle:
            handmade.write_bundle(folder / "target", {"old": b""})
        self.refused(folder / "target", False, "exists already; name another folder, or replace it with --overwrite")
        with atomic_folder(folder / "target", overwrite=True) as work:
            (work / "new").touch()
        assert names_in(folder) == ["target"]
        assert names_in(folder / "target") == ["new"]

    def test_other_folders_of_ours_are_known_by_another_file(self, folder: Path) -> None:
        handmade.write_bundle(folder / "target", FILES)
        work = atomic_folder(folder / "target", overwrite=True, known_by="model_index.json")
        with pytest.raises(OutputError, match=r"has no model_index\.json"), work:
            pytest.fail("the work began")
        (folder / "target" / "model_index.json").touch()
        with atomic_folder(folder / "target", overwrite=True, known_by="model_index.json"):
            pass
        assert names_in(folder / "target") == []

    @pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), disk_full()])
    def test_the_old_bundle_stays_whole_when_the_new_one_fails(self, folder: Path, error: BaseException) -> None:
        handmade.write_bundle(folder / "target", FILES)
        with pytest.raises((type(error), OutputError)), atomic_folder(folder / "target", overwrite=True) as work:
            (work / "new").touch()
            raise error
        assert names_in(folder) == ["target"]
        Bundle.open(folder / "target").verify(afresh=True)

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), disk_full()])
    @pytest.mark.parametrize("failing", [1, 2])
    def test_the_old_bundle_stays_whole_when_renaming_fails(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, failing: int
    ) -> None:
        handmade.write_bundle(folder / "target", FILES)
        calls, rename = iter(range(1, 9)), Path.rename

        def fail(path: Path, target: Path) -> Path:
            if next(calls) == failing:
                raise error
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises((type(error), OutputError)), atomic_folder(folder / "target", overwrite=True):
            pass
        assert names_in(folder) == ["target"]
        Bundle.open(folder / "target").verify(afresh=True)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_what_appears_meanwhile_is_not_replaced(self, folder: Path, overwrite: bool) -> None:
        with pytest.raises(OutputError, match="exists"), atomic_folder(folder / "target", overwrite=overwrite):
            (folder / "target").mkdir()
            (folder / "target" / "mine").touch()
        assert names_in(folder) == ["target"]
        assert names_in(folder / "target") == ["mine"]

    @pytest.mark.parametrize("exists", [True, False])
    def test_a_link_is_refused_before_the_work(self, folder: Path, exists: bool) -> None:
        if exists:
            handmade.write_bundle(folder / "real", FILES)
        (folder / "target").symlink_to("real")
        self.refused(folder / "target", True, "is a link; name the folder itself")
        assert (folder / "target").is_symlink()
        assert (folder / "real").exists() == exists

    def test_below_a_file(self, folder: Path) -> None:
        (folder / "file").touch()
        self.refused(folder / "file" / "target", False, r"cannot be written \(Not a directory")
        assert names_in(folder) == ["file"]

    def test_a_name_too_long(self, folder: Path) -> None:
        self.refused(folder / ("n" * 300), False, r"cannot be written \(File name too long")
        assert names_in(folder) == []

    def test_a_folder_that_may_not_be_written(self) -> None:
        user = os.geteuid()
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o555)
            if user == 0:  # Who may write anywhere.
                os.seteuid(65534)
            try:
                self.refused(Path(folder, "target"), False, r"\(Permission denied.*; check the path and its rights")
            finally:
                os.seteuid(user)

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where nobody can make a folder")
    def test_a_folder_that_takes_no_folders(self) -> None:
        self.refused(Path("/proc/target"), False, "cannot be written .*; check the path and its rights")

    @staticmethod
    def refused(target: Path, overwrite: bool, message: str) -> None:
        with pytest.raises(OutputError, match=message) as caught, atomic_folder(target, overwrite=overwrite):
            pytest.fail("the work began")
        assert str(target) in str(caught.value)
        assert "\n" not in str(caught.value)
