"""An open bundle: its files and tensors, checked against its manifest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from zimgkit.engines.bundle import verified
from zimgkit.engines.bundle.graphs import External, with_locations
from zimgkit.engines.bundle.manifest import MANIFEST, CompiledEngine, Component, Manifest, read_manifest
from zimgkit.engines.errors import BundleError, OutputError
from zimgkit.engines.tensors import safetensors

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class Bundle:
    """An open bundle. Use :meth:`open`."""

    root: Path
    manifest: Manifest
    state: str = field(default="", compare=False)
    """The manifest's :func:`.verified.state` when it was read; none of a bundle that is being made."""
    present: tuple[str, ...] | None = field(default=None, compare=False)
    """The files that are here, of a bundle that was not fetched whole; None where all are."""
    in_place: bool = field(default=False, compare=False)
    """Whether weights are to be read from their files in every run, where a copy would be faster and take memory."""
    weights_budget: int | None = field(default=None, compare=False)
    """Bytes of a component's weights that PyTorch may keep on a device of its own; None for all."""

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True, names: tuple[str, ...] | None = None) -> Bundle:
        """Read a bundle's manifest and check its files against it.

        Hashes are computed on the first opening, and again only for files whose size or times changed since.

        Args:
            path: the bundle's folder.
            verify: whether to check sizes and hashes; those of links that lead out of the folder always are.
            names: the files that are there, of a bundle that was not fetched whole; all when None.

        Raises:
            BundleError: no bundle there, a newer schema, a missing or changed file, or a path that leaves the bundle.
        """
        bundle = replace(cls.read(path), present=names)
        for name in bundle.names:
            bundle.file(name)
        bundle.verify(bundle.names if verify else bundle.linked)
        return bundle

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read a bundle's manifest alone; nothing of its files is known then.

        Raises:
            BundleError: no bundle there, or of a newer schema.
        """
        root = Path(path)
        try:
            state = verified.state(root / MANIFEST)
        except (OSError, ValueError):
            state = ""  # Which reading it explains.
        return cls(root.resolve(), read_manifest(root), state)

    def file(self, name: str) -> Path:
        """The path of one of the bundle's files. It may be a link to anywhere, as in a hub's cache: its hash counts.

        Raises:
            BundleError: the name leads out of the bundle, or the manifest does not list it, or it is missing.
        """
        pure, manifest = PurePosixPath(name), self.root / MANIFEST
        path = self.root / pure
        if pure.is_absolute() or ".." in pure.parts or "\\" in name:
            raise BundleError(f"{manifest} names {name!r}, which leads out of the bundle", "do not trust it")
        if name not in self.manifest.files:
            raise BundleError(f"{manifest} does not list {name!r}", "build the bundle again")
        try:
            path.resolve()  # Which tells of links in a circle.
            present = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:
            # Too long a name, or a null byte.
            message = f"{manifest} names {name!r}, which cannot be opened ({error})"
            raise BundleError(message, "do not trust it") from None
        if not present:
            self.check_unchanged()
            link = f" (it is a link to {path.resolve()})" if path.is_symlink() else ""
            raise BundleError(f"{path} is missing{link}", "copy or build the bundle again")
        return path

    @property
    def names(self) -> tuple[str, ...]:
        """Its files that are here."""
        return tuple(self.manifest.files) if self.present is None else self.present

    @cached_property
    def linked(self) -> tuple[str, ...]:
        """Its files that lie elsewhere: links that lead out of its folder."""
        return tuple(name for name in self.names if not self.file(name).resolve().is_relative_to(self.root))

    def check_unchanged(self, component: str | None = None) -> None:
        """Check that what was opened is what is there: a build or a swap may have taken its place.

        Args:
            component: the one whose files count; all files where None.

        Raises:
            BundleError: it was changed, moved or removed.
        """
        with contextlib.suppress(OSError):
            if not self.state or verified.state(self.root / MANIFEST) == self.state:
                return
        try:
            found = read_manifest(self.root).files
        except BundleError:
            found = {}
        names = self._files_of(component) if component else self.manifest.files
        if any(found.get(name) != self.manifest.files.get(name) for name in names):
            raise BundleError(f"{self.root} was changed or moved while it was open", "open it again")

    def check_changeable(self) -> None:
        """Check that its files are its own, before they are replaced.

        Raises:
            OutputError: they are links to elsewhere, or the folder is read-only.
        """
        copy = f"copy it first: cp -rL {shlex.quote(str(self.root))} COPY"
        if self.linked or (self.root / MANIFEST).is_symlink():
            raise OutputError(f"{self.root} is a folder of links, as a hub's cache has, and is not changed", copy)
        if not os.access(self.root, os.W_OK):
            raise OutputError(f"{self.root} is read-only", copy)

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
        entry = self.component(component)
        for name in entry.weights:
            if name not in self._headers:
                self._headers[name] = safetensors.read_header(self.file(name))
            before = entry.prefixes.get(name, "")
            own = ((before + key, info) for key, info in self._headers[name].items())
            found.update((key, replace(info, name=key) if before else info) for key, info in own)
        return found

    def verify(
        self, names: Iterable[str] | None = None, *, afresh: bool = False, report: Report = lambda *_: None
    ) -> None:
        """Check files' sizes and hashes, and where graphs point, up to the first that is not what the manifest says.

        Args: as :meth:`mismatches` takes them.

        Raises:
            BundleError: naming that file.
        """
        with contextlib.closing(self.mismatches(names, afresh=afresh, report=report)) as found:
            for error in found:
                raise error

    def mismatches(
        self, names: Iterable[str] | None = None, *, afresh: bool = False, report: Report = lambda *_: None
    ) -> Generator[BundleError, None, None]:
        """What of the bundle is not what the manifest says, as it is found.

        Args:
            names: of the files; all that are here when None.
            afresh: hash every byte again, even of files seen unchanged since an earlier check.
            report: called with ("hash, MB", done, total), from several threads.

        Yields:
            An error for each such file.
        """
        paths: dict[str, Path] = {}
        for name in self.names if names is None else names:
            try:
                paths[name] = self.file(name)
                self._check_size(name, paths[name])
            except BundleError as error:
                paths.pop(name, None)
                yield error
        fresh = {name: path for name, path in paths.items() if afresh or not verified.is_known(path, self._mark(name))}
        # Taken before the bytes are read: what changes meanwhile is read again the next time.
        states = {name: verified.state(path) for name, path in fresh.items()}
        total = sum(self.manifest.files[name].size for name in fresh)

        def advance(done: int) -> None:
            report("hash, MB", done // 10**6, total // 10**6)

        with contextlib.closing(verified.hashes(fresh.values(), advance)) as digests:
            for (name, path), digest in zip(fresh.items(), digests, strict=True):
                if isinstance(digest, OSError):
                    yield BundleError(f"{path} cannot be read ({digest.strerror})", "check its rights and the disk")
                elif digest != self._hash(name):
                    yield self._changed(path)
                elif broken := self._misplaced(name):
                    yield broken
                else:
                    verified.remember(path, self._mark(name), states[name])

    def _check_size(self, name: str, path: Path) -> None:
        size, expected = path.stat().st_size, self.manifest.files[name].size
        if size != expected:
            with path.open("rb") as file:
                pointer = file.read(8) == b"version "
            hint = "it is a Git LFS pointer: git lfs pull" if pointer else "copy or build the bundle again"
            raise BundleError(f"{path} has {size:,} of {expected:,} bytes", hint)

    def _changed(self, path: Path) -> BundleError:
        link = "" if path.resolve().is_relative_to(self.root) else f" (it is a link to {path.resolve()})"
        message = f"{path} was changed: its hash is not the manifest's{link}"
        return BundleError(message, "copy or build the bundle again")

    def _misplaced(self, name: str) -> BundleError | None:
        """What is wrong with where a graph's tensors lie."""
        if name not in self._graphs:
            return None
        try:
            self.located(name)
        except BundleError as error:
            return error
        return None

    def located(self, name: str, place: Callable[[str], str] = str) -> bytes:
        """One of its graphs, after a look at where its tensors lie.

        Args:
            name: of the graph's file.
            place: gives where a file of the bundle is to be looked for, from its name; there, relative to the graph.

        Raises:
            BundleError: it is no graph, or a tensor does not lie in a file that the manifest lists.
        """
        path, folder = self.file(name), PurePosixPath(name).parent

        def moved(tensor: External) -> str:
            file = (folder / tensor.location).as_posix()
            end = tensor.offset + (tensor.length or 0)
            if file not in self.manifest.files or end > self.manifest.files[file].size:
                what = f"{tensor.location!r}, bytes {tensor.offset} to {end}"
                raise ValueError(f"{tensor.name!r} lies in {what}, which the manifest has not")
            return tensor.location if place is str else place(file)

        try:
            return with_locations(path.read_bytes(), moved)
        except ValueError as error:
            raise BundleError(f"{path} is broken: {error}", "copy or build the bundle again") from None

    @cached_property
    def _graphs(self) -> frozenset[str]:
        return frozenset(file for component in self.manifest.components.values() for file in component.graphs.values())

    def _files_of(self, component: str) -> tuple[str, ...]:
        entry = self.component(component)
        engines = (file for e in self.manifest.engines if e.component == component for file in e.files)
        return (*entry.weights, *entry.graphs.values(), *engines)

    def _mark(self, name: str) -> str:
        """What is noted of a file once it is verified; of a graph also what files there are to point into."""
        return f"{self._hash(name)}{self._listing}" if name in self._graphs else self._hash(name)

    @cached_property
    def _listing(self) -> str:
        sizes = sorted((name, record.size) for name, record in self.manifest.files.items())
        return hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]

    def _hash(self, name: str) -> str:
        return self.manifest.files[name].sha256

    def trust(self) -> None:
        """Take the files for verified: whoever wrote them has just hashed them."""
        for name in self.manifest.files:
            path = self.file(name)
            verified.remember(path, self._mark(name), verified.state(path))

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
