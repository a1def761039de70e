"""Bundles of links, as hubs' caches have them: followed where the manifest's hash of the target holds."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests import handmade
from zimgkit.engines.base import open_engine
from zimgkit.engines.bundle import MANIFEST, Bundle, Component, TensorSpec, write_manifest
from zimgkit.engines.errors import BundleError, OutputError
from zimgkit.engines.tensors import safetensors

FILES = {"net.safetensors": bytes(range(200)), "tokenizer/tokenizer.json": b"{}"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def snapshot(bundle: Path, repository: Path) -> Path:
    """A bundle as the cache of Hugging Face's hub has it: every file is a link to a blob."""
    folder = repository / "snapshots" / "abc123"
    (repository / "blobs").mkdir(parents=True)
    for path in filter(Path.is_file, bundle.rglob("*")):
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = folder / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(link.relative_to(repository).parts) - 1)) / "blobs" / blob.name)
    return folder


@pytest.fixture
def linked(tmp_path):
    return snapshot(handmade.write_bundle(tmp_path / "bundle", FILES), tmp_path / "models--me--net")


def refused(path, **options):
    with pytest.raises(BundleError) as caught:
        Bundle.open(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_links_are_followed(linked):
    bundle = Bundle.open(linked)
    assert {name: bundle.file(name).read_bytes() for name in FILES} == FILES
    assert set(bundle.linked) == set(FILES)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("content", [bytes(200), b"short"])
def test_a_target_that_is_not_what_the_manifest_says(linked, tmp_path, verify, content):
    """Even where no hashes are asked for: what lies outside is nobody's word but the hash's."""
    (tmp_path / "secret").write_bytes(content)
    (linked / "net.safetensors").unlink()
    (linked / "net.safetensors").symlink_to(tmp_path / "secret")
    message = refused(linked, verify=verify)
    assert re.search(
        r"has 5 of 200 bytes|was changed: its hash is not the manifest's \(it is a link to .*secret\)", message
    )


@pytest.mark.parametrize("target", ["/dev/zero", "/", "nowhere", "/proc/self/environ"])
def test_links_to_what_is_no_file_of_a_bundle(linked, target):
    (linked / "net.safetensors").unlink()
    (linked / "net.safetensors").symlink_to(target)
    assert re.search(r"is missing \(it is a link to .*\)|has 0 of 200 bytes", refused(linked, verify=False))


def test_a_folder_that_is_a_link(tmp_path):
    root = handmade.write_bundle(tmp_path / "bundle", FILES)
    (root / "tokenizer").rename(tmp_path / "elsewhere")
    (root / "tokenizer").symlink_to("../elsewhere")
    assert Bundle.open(root).linked == ("tokenizer/tokenizer.json",)
    (tmp_path / "elsewhere" / "tokenizer.json").write_bytes(b"[]")
    assert "was changed" in refused(root)


def test_the_entry_of_the_cache_names_the_snapshot(linked):
    repository = linked.parents[1]
    assert refused(repository).endswith(f"is not a bundle: it has no {MANIFEST}; name {linked}")


def test_a_manifest_whose_target_is_missing(linked, tmp_path):
    shutil.copytree(linked, tmp_path / "copy", symlinks=True)
    assert re.search(
        r"bundle\.json is a link to .*, which is missing; copy the bundle whole", refused(tmp_path / "copy")
    )


def test_a_pointer_of_git_lfs(tmp_path):
    root = handmade.write_bundle(tmp_path / "bundle", FILES)
    (root / "net.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert refused(root).endswith("of 200 bytes; it is a Git LFS pointer: git lfs pull")


def test_links_are_never_written_through(linked, tmp_path):
    bundle = Bundle.open(linked)
    with pytest.raises(OutputError, match=r"is a folder of links, .*; copy it first: cp -rL .*abc123 COPY"):
        bundle.check_changeable()
    shutil.copytree(linked, tmp_path / "copy")  # Which follows links.
    Bundle.open(tmp_path / "copy").check_changeable()


def test_a_read_only_folder_is_not_changed(tmp_path, monkeypatch):
    bundle = Bundle.open(handmade.write_bundle(tmp_path / "bundle", FILES))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(OutputError, match=r"is read-only; copy it first"):
        bundle.check_changeable()


def write_network(root: Path, location: str = "net.safetensors") -> Path:
    """A bundle whose ``net`` adds its one weight to its input."""
    import onnx
    from onnx import TensorProto, helper

    root.mkdir()
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    (info,) = safetensors.write(root / "net.safetensors", {"w": ("float32", (2, 3))}, {"w": [weight]}).values()
    tensor = TensorProto(name="w", data_type=1, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": info.offset, "length": info.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    ends = [helper.make_tensor_value_info(name, 1, [2, 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    (root / "graphs").mkdir()
    onnx.save(model, root / "net.onnx")
    spec = TensorSpec("float32", (2, 3))
    files = {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}
    net = Component(("net.safetensors",), {"float32": "net.onnx"}, {"x": spec}, {"y": spec})
    return handmade.write_bundle(root, files, components={"net": net})


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
@pytest.mark.parametrize("only", ["*", "*.safetensors", "*.onnx"])
def test_engines_run_from_links(tmp_path, backend, only):
    root = write_network(tmp_path / "ü 100% #x")
    elsewhere = tmp_path / "another disk" / "blöbs"
    elsewhere.mkdir(parents=True)
    for index, path in enumerate(sorted(root.glob(only))):
        if path.is_file():
            path.rename(elsewhere / str(index))
            path.symlink_to(elsewhere / str(index))
    engine = open_engine(Bundle.open(root), "net", backend, "cpu")
    y = engine.run({"x": np.ones((2, 3), np.float32)})["y"]
    np.testing.assert_array_equal(y, np.arange(6, dtype=np.float32).reshape(2, 3) + 1)


@pytest.mark.parametrize("location", ["stray.safetensors", "../secret", "{absolute}"])
def test_graphs_that_point_into_what_the_manifest_does_not_list(tmp_path, location):
    shutil.copyfile(write_network(tmp_path / "good") / "net.safetensors", tmp_path / "secret")
    root = write_network(tmp_path / "bundle", location.format(absolute=tmp_path / "secret"))
    shutil.copyfile(tmp_path / "secret", root / "stray.safetensors")
    assert re.search(r"net\.onnx is broken: 'w' lies in .*, which the manifest has not", refused(root))
    assert "net.onnx is broken" in refused(root)


def test_a_graph_is_looked_at_again_when_the_list_of_files_changes(tmp_path):
    root = write_network(tmp_path / "bundle")
    bundle = Bundle.open(root)
    (root / "net.safetensors").rename(root / "w.safetensors")
    files = {"w.safetensors" if name == "net.safetensors" else name: r for name, r in bundle.manifest.files.items()}
    net = msgspec.structs.replace(bundle.component("net"), weights=("w.safetensors",))
    write_manifest(root, msgspec.structs.replace(bundle.manifest, files=files, components={"net": net}))
    assert "'w' lies in 'net.safetensors', bytes" in refused(root)


class TestChangedWhileOpen:
    """Any command that replaces a bundle, or a part of it, while engines are still to be opened."""

    @pytest.fixture
    def bundle(self, tmp_path):
        return Bundle.open(write_network(tmp_path / "bundle"))

    def refused(self, bundle):
        with pytest.raises(BundleError, match=r"bundle was changed or moved while it was open; open it again"):
            open_engine(bundle, "net", "onnxruntime", "cpu")

    def test_another_one_in_its_place(self, bundle, tmp_path):
        other = write_network(tmp_path / "other")
        content = (other / "net.safetensors").read_bytes()
        handmade.write_bundle(
            other, {"net.safetensors": content[:-4] + b"\0\0\0\1", "net.onnx": (other / "net.onnx").read_bytes()},
            components=bundle.manifest.components,
        )  # fmt: skip
        bundle.root.rename(tmp_path / "old")
        other.rename(bundle.root)
        self.refused(bundle)

    @pytest.mark.parametrize("moved", ["moved", None])
    def test_moved_or_removed(self, bundle, tmp_path, moved):
        bundle.root.rename(tmp_path / moved) if moved else shutil.rmtree(bundle.root)
        self.refused(bundle)
        with pytest.raises(BundleError, match="while it was open"):
            bundle.file("net.onnx")

    def test_a_swapped_file(self, bundle):
        (bundle.root / "net-2.safetensors").write_bytes(bundle.file("net.safetensors").read_bytes())
        files = {name: r for name, r in bundle.manifest.files.items() if name != "net.safetensors"}
        write_manifest(bundle.root, msgspec.structs.replace(bundle.manifest, files=files))
        (bundle.root / "net.safetensors").unlink()
        self.refused(bundle)

    def test_what_is_added_to_it_does_no_harm(self, bundle):
        write_manifest(bundle.root, msgspec.structs.replace(bundle.manifest, tools={"compiled": "since"}))
        open_engine(bundle, "net", "onnxruntime", "cpu")
