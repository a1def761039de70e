"""An open bundle: its files and tensors, checked against its manifest."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from zimgkit.engines.bundle import verified
from zimgkit.engines.bundle.manifest import MANIFEST, CompiledEngine, Component, Manifest, read_manifest
from zimgkit.engines.bundle.verified import sha256
from zimgkit.engines.errors import BundleError
from zimgkit.engines.tensors import safetensors


@dataclass(frozen=True)
class Bundle:
    """An open bundle. Use :meth:`open`."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
        """Read a bundle's manifest and check its files against it.

        Hashes are computed on the first opening, and again only for files whose size or times changed since.

        Args:
            path: the bundle's folder.
            verify: whether to check sizes and hashes at all.

        Raises:
            BundleError: no bundle there, a newer schema, a missing or changed file, or a path that leaves the bundle.
        """
        root = Path(path)
        bundle = cls(root.resolve(), read_manifest(root))
        for name in bundle.manifest.files:
            bundle.file(name)
        if verify:
            bundle.verify()
        return bundle

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files.

        Raises:
            BundleError: the name leads out of the bundle, or the manifest does not list it, or it is missing.
        """
        pure, manifest = PurePosixPath(name), self.root / MANIFEST
        path = self.root / pure
        try:
            leaves = pure.is_absolute() or ".." in pure.parts or "\\" in name
            leaves = leaves or not path.resolve().is_relative_to(self.root)
            present = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:
            # Too long a name, a null byte, links in a circle.
            message = f"{manifest} names {name!r}, which cannot be opened ({error})"
            raise BundleError(message, "do not trust it") from None
        if leaves:
            raise BundleError(f"{manifest} names {name!r}, which leads out of the bundle", "do not trust it")
        if name not in self.manifest.files:
            raise BundleError(f"{manifest} does not list {name!r}", "build the bundle again")
        if not present:
            raise BundleError(f"{path} is missing", "copy or build the bundle again")
        return path

    def component(self, name: str) -> Component:
        """One component's entry in the manifest.

        Raises:
            BundleError: the bundle has no such component.
        """
        try:
            return self.manifest.components[name]
        except KeyError:
            known = ", ".join(self.manifest.components)
            raise BundleError(f"{self.root} has no component {name!r}, only {known}") from None

    @cached_property
    def _headers(self) -> dict[str, dict[str, safetensors.TensorInfo]]:
        return {}

    def tensors(self, component: str) -> dict[str, safetensors.TensorInfo]:
        """Where the tensors in a component's weight files lie, by name."""
        found: dict[str, safetensors.TensorInfo] = {}
        for name in self.component(component).weights:
            if name not in self._headers:
                self._headers[name] = safetensors.read_header(self.file(name))
            found.update(self._headers[name])
        return found

    def verify(self, *, afresh: bool = False) -> None:
        """Check every file's size and hash.

        Args:
            afresh: hash every byte again, even of files seen unchanged since an earlier check.

        Raises:
            BundleError: naming the first file that is not what the manifest says.
        """
        paths = {name: self.file(name) for name in self.manifest.files}
        for name, path in paths.items():
            size, expected = path.stat().st_size, self.manifest.files[name].size
            if size != expected:
                raise BundleError(f"{path} has {size:,} of {expected:,} bytes", "copy or build the bundle again")
        fresh = [name for name, path in paths.items() if afresh or not verified.is_known(path, self._hash(name))]
        # Taken before the bytes are read: what changes meanwhile is read again the next time.
        states = [verified.state(paths[name]) for name in fresh]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            hashes = pool.map(lambda name: sha256(paths[name]), fresh)
            for name, state, digest in zip(fresh, states, hashes, strict=True):
                if digest != self._hash(name):
                    raise BundleError(
                        f"{paths[name]} was changed: its hash is not the manifest's", "copy or build the bundle again"
                    )
                verified.remember(paths[name], digest, state)

    def _hash(self, name: str) -> str:
        return self.manifest.files[name].sha256

    def trust(self) -> None:
        """Take the files for verified: whoever wrote them has just hashed them."""
        for name, record in self.manifest.files.items():
            path = self.file(name)
            verified.remember(path, record.sha256, verified.state(path))

    def engines(self, component: str, backend: str) -> list[CompiledEngine]:
        """What was compiled from a component for a backend."""
        return [e for e in self.manifest.engines if e.component == component and e.backend == backend]

    def source_hash(self, component: str) -> str:
        """A hash of a component's weights and of its graph in the bundle's precision: what engines are made from."""
        graph = next(iter(self.component(component).graphs.values()))
        return hashlib.sha256(f"{self._hash(graph)}{self.content_hash(component)}".encode()).hexdigest()

    def content_hash(self, component: str) -> str:
        """A hash of all weights of a component, for keys of caches."""
        joined = "".join(self._hash(name) for name in self.component(component).weights)
        return hashlib.sha256(joined.encode()).hexdigest()
