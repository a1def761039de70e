"""Another set of LoRAs, or none, for a bundle that is built: only what the old set or the new one touches is written.

What LoRAs touch lies in a file of its own for each component, and the graphs point there. A swap writes new such files
and copies of the graphs with other byte ranges, and then replaces the manifest in one step: until then the old bundle
is whole, from then on the new one. The other files are not even read.

Of a quantized bundle the weights they touch are merged in float32, from the checkpoint's, and quantized again, with new
scales of their own. What was calibrated stays: the scales of inputs, and the factors that smooth them.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
import onnx

from zimgkit.engines.bundle import (
    Bundle,
    CompiledEngine,
    Component,
    FileRecord,
    Manifest,
    Refit,
    atomic_folder,
    sha256,
    write_manifest,
)
from zimgkit.engines.bundle.locks import only_writer_of
from zimgkit.engines.errors import BundleError, OutputError, UsageError
from zimgkit.engines.files import flush
from zimgkit.engines.tensors.dtypes import BY_ONNX, to_float32
from zimgkit.engines.tensors.safetensors import TensorInfo, read_header
from zimgkit.export.checkpoints.checkpoint import canonical
from zimgkit.export.lora import known
from zimgkit.export.lora.merge import NOTHING, Merge, merge, read_loras
from zimgkit.export.lora.names import Names
from zimgkit.export.lora.origin import Origin
from zimgkit.export.networks.registry import LORA_SOURCES, is_unused, row
from zimgkit.export.quantization.formats import SCALE
from zimgkit.export.quantization.quantized_weights import WEIGHT_SCALE, as_stored, float_shapes
from zimgkit.export.weights.layout import base_name, graph_name, lora_name
from zimgkit.export.weights.stream import Progress, Wanted, pieces, write_wanted, written_bytes
from zimgkit.runtime.progress import Report, silent

OWN = re.compile(
    rf"({'|'.join(LORA_SOURCES)})(\.\w+){{0,2}}(-[0-9a-f]{{8}})?\.(safetensors|onnx)|\.bundle\.json\.[0-9a-f]{{8}}\.part"
)
"""Files that a swap writes, or replaces."""
OUTGROWN = 2.0
"""How much larger than without LoRAs a row of a quantized weight may become before that is worth a word.

Twice is a bit: from there on the row itself is rounded twice as coarsely, and what it gives may be twice as large as
what the inputs of the linears after it were calibrated on, which are cut off there.
"""


@dataclass(frozen=True)
class Swapped:
    """A bundle after a swap."""

    bundle: Bundle
    stale: tuple[CompiledEngine, ...]
    """Engines that were compiled from other weights than the bundle has now."""
    refitted: tuple[str, ...]
    """Components whose engines take the weights they have now whenever they are loaded."""
    written: int
    """Bytes of weights."""
    ignored: tuple[str, ...]
    """What of the LoRAs means nothing here, where that was allowed."""
    outgrown: dict[str, float]
    """Quantized weights of which some row became larger than :data:`OUTGROWN` times what it is without LoRAs -> how
    many times, the largest first."""


def swap(
    path: Path,
    loras: Sequence[str],
    *,
    out: Path | None = None,
    overwrite: bool = False,
    keep_base: bool = False,
    model: str | None = None,
    revision: str | None = None,
    source: str = "huggingface",
    allow_unmatched: bool = False,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    report: Report = silent,
) -> Swapped:
    """Give a bundle another set of LoRAs.

    Args:
        path: the bundle's folder.
        loras: the new set, see :func:`zimgkit.export.lora.source.find_lora`; none of the old set stays.
        out: a folder for the result, whose other files are hard links; the bundle itself is changed when None.
        overwrite: replace a bundle that is at ``out``.
        keep_base: keep what LoRAs touch without them as well, so that the next set needs no checkpoint.
        model: the checkpoint it was built from, where that is not where it was.
        revision: of that, on the hub.
        source: the hub of the checkpoint and of LoRAs, ``"huggingface"`` or ``"modelscope"``.
        allow_unmatched: go on where a LoRA has modules that the bundle has not.
        num_inference_steps: another default than the checkpoint's or the LoRAs'.
        guidance_scale: likewise, as diffusers counts it.
        report: called with (stage, done, total).

    Raises:
        ZimgError: whatever went wrong, in one line. The bundle is as it was then.
    """
    path = path.expanduser().absolute()
    target = path if out is None else out.expanduser().absolute()
    if out is not None and target.resolve() == path.resolve():
        raise UsageError(f"{out} is the bundle itself", "leave --out out to change it")
    with only_writer_of(path), only_writer_of(target) if out is not None else contextlib.nullcontext():
        bundle = Bundle.open(path)
        if out is None:
            bundle.check_changeable()
        job = _Swap(bundle, Origin(bundle, model, revision, source), keep_base, report)
        read = read_loras(loras, source)
        merged = merge(read, job.names, bundle.manifest.family, allow_unmatched=allow_unmatched) if read else NOTHING
        settings = _settings(bundle.manifest, merged, num_inference_steps, guidance_scale)
        with _place(bundle, out, target, overwrite=overwrite) as folder:
            job.run(merged, folder)
            manifest = job.manifest(folder, merged, settings)
            if out is not None:
                job.link_others(manifest, folder)
            write_manifest(folder, manifest)
        changed = Bundle.open(target, verify=False)
        changed.trust()
    return Swapped(changed, job.stale, job.refitted, job.written, merged.ignored, job.outgrown)


def _settings(manifest: Manifest, merged: Merge, steps: int | None, guidance: float | None) -> known.Recommendation:
    base = _base_settings(manifest)
    return known.recommendation_for(
        merged.loras, manifest.family, base, num_inference_steps=steps, guidance_scale=guidance
    )


def _base_settings(manifest: Manifest) -> known.Recommendation:
    """What the bundle recommends without LoRAs."""
    return known.Recommendation(
        manifest.base_defaults or manifest.defaults,
        manifest.scheduler if manifest.base_scheduler is None else manifest.base_scheduler,
    )


@contextlib.contextmanager
def _place(bundle: Bundle, out: Path | None, target: Path, *, overwrite: bool) -> Iterator[Path]:
    """The folder to write into: the bundle's own, which loses what was written where that fails, or a new one."""
    if out is not None:
        with atomic_folder(target, overwrite=overwrite) as folder:
            yield folder
        return
    _clear_strays(bundle)
    try:
        yield bundle.root
    except OSError as error:
        message = f"{bundle.root} cannot be written ({error.strerror or error})"
        raise OutputError(message, "free some space, or check its rights; the bundle is as it was") from None
    finally:
        # What was replaced, or where that failed, what was written.
        _clear_strays(Bundle.open(bundle.root, verify=False))


def _clear_strays(bundle: Bundle) -> None:
    """Remove what the manifest does not name of the files that swaps write or replace: a kill leaves some."""
    for path in bundle.root.iterdir():
        if OWN.fullmatch(path.name) and path.name not in bundle.manifest.files:
            path.unlink(missing_ok=True)


@dataclass
class _Change:
    """What becomes of one component."""

    lora: dict[str, Wanted]
    """Its file of merged tensors: name -> what it comes from."""
    base: dict[str, Wanted]
    """Its file of base weights, where that is written anew."""
    moved: dict[str, TensorInfo] = field(default_factory=dict)
    """Where tensors lie now that lay elsewhere."""
    files: dict[str, str] = field(default_factory=dict)
    """``"lora"`` or ``"base"`` -> the new file."""
    graphs: dict[str, dict[str, str]] = field(default_factory=dict)
    """The component or one of its variants -> the element type a graph computes in -> the new file."""


class _Swap:
    """One swap."""

    def __init__(self, bundle: Bundle, origin: Origin, keep_base: bool, report: Report) -> None:
        self._bundle, self._origin, self._keep_base, self._report = bundle, origin, keep_base, report
        self._suffix = f"-{secrets.token_hex(4)}"
        self._parts = {name: c for name, c in bundle.manifest.components.items() if name in LORA_SOURCES}
        # Variants are more graphs over a component's weights: what changes for it changes for them.
        self._members = {name: (name, *bundle.manifest.variants(name)) for name in self._parts}
        self._graphs = {
            member: {
                compute: _read_graph(bundle.file(file)) for compute, file in bundle.component(member).graphs.items()
            }
            for members in self._members.values()
            for member in members
        }
        self._headers: dict[str, dict[str, TensorInfo]] = {}
        self._changes: dict[str, _Change] = {}
        self.stale: tuple[CompiledEngine, ...] = ()
        self.refitted: tuple[str, ...] = ()
        self.written = 0
        self.outgrown: dict[str, float] = {}

    @cached_property
    def _shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Component -> the tensors that it consists of, by their stored names, in the checkpoint's shapes."""
        found = {}
        for name, component in self._parts.items():
            tensors, graphs = self._bundle.tensors(name), self._graphs[name]
            own = _initializers(next(iter(graphs.values()))) if graphs else component.tensors
            if missing := [tensor for tensor in own if tensor not in tensors]:
                raise BundleError(f"{self._bundle.root} has no tensor {missing[0]}", "build the bundle again")
            found[name] = float_shapes(self._bundle, name, own)
        return found

    @cached_property
    def names(self) -> Names:
        """The modules that LoRAs can change."""
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, tensors in self._shapes.items():
            known_names = shapes.setdefault(LORA_SOURCES[name], {})
            known_names |= {canonical(LORA_SOURCES[name], tensor): shape for tensor, shape in tensors.items()}
        family, config = self._bundle.manifest.family, self._bundle.manifest.config
        return Names(
            shapes,
            row(family).lora_aliases,
            lambda component, name: is_unused(family, component, config[component], name),
        )

    def run(self, merged: Merge, folder: Path) -> None:
        """Write the new files of every component that changes into a folder."""
        self._changes = {name: change for name in self._parts if (change := self._plan(name, merged))}
        precision = self._bundle.manifest.precision
        jobs = []
        for name, change in self._changes.items():
            merged_file, base_file = lora_name(name, self._suffix), base_name(name, self._suffix)
            merged_wants = {key: (want, want.dtype(precision)) for key, want in change.lora.items()}
            jobs.append((change, "lora", merged_file, merged_wants))
            base_wants = {key: (want, want.source.dtype) for key, want in change.base.items()}
            jobs.append((change, "base", base_file, base_wants))
        self.written = sum(written_bytes(want, dtype) for *_, wants in jobs for want, dtype in wants.values())
        self._check_space(folder)
        progress = Progress(self.written, lambda done, total: self._report("weights", done, total))
        for change, role, file, wants in jobs:
            if wants:
                written = write_wanted(folder / file, wants, progress)
                flush(folder / file)
                change.files[role] = file
                change.moved |= written if role == "lora" else {}
        growth = [entry for name, change in self._changes.items() for entry in self._growth(name, change)]
        self.outgrown = dict(sorted(growth, key=lambda entry: -entry[1]))
        for name, change in self._changes.items():
            for member in self._members[name]:
                change.graphs[member] = {}
                for compute, graph in self._graphs[member].items():
                    _point_to(graph, change.moved, (folder, self._bundle.root))
                    path = folder / graph_name(member, compute, precision, self._suffix)
                    path.write_bytes(graph.SerializeToString(deterministic=True))
                    flush(path)
                    change.graphs[member][compute] = path.name

    def _plan(self, name: str, merged: Merge) -> _Change | None:
        """What has to be written for a component; None where nothing changes."""
        component, source = self._parts[name], LORA_SOURCES[name]
        shapes = self._shapes[name]
        addends = merged.addends.get(source, {})
        touched = {tensor: addends[key] for tensor in shapes if (key := canonical(source, tensor)) in addends}
        before = self._file(component.lora)
        if not touched and not before:
            return None
        base = self._base(component)
        # Files of base weights hold none of what was merged when they were written; it goes on lying beside them.
        homeless = (before.keys() - base.keys()) & shapes.keys()
        needed = sorted(touched.keys() | homeless)
        exact = {tensor: self._exact(component, base, source, tensor, shapes[tensor]) for tensor in needed}
        wants = {tensor: Wanted(exact[tensor], shapes[tensor], addends=touched.get(tensor, ())) for tensor in needed}
        wants = {tensor: _renamed(want, tensor) for tensor, want in wants.items()}
        wants = as_stored(self._bundle, name, wants)
        kept: dict[str, Wanted] = {}
        if self._keep_base:
            kept = {
                tensor: _renamed(Wanted(exact[tensor], shapes[tensor]), tensor)
                for tensor in needed
                if not exact[tensor].file.is_relative_to(self._bundle.root)
            }
            old = self._file(component.base)
            kept |= {tensor: Wanted(info, info.shape) for tensor, info in old.items() if kept and tensor not in kept}
        moved = {tensor: base[tensor] for tensor in before.keys() - wants.keys()}
        return _Change(wants, kept, moved)

    def _growth(self, name: str, change: _Change) -> Iterator[tuple[str, float]]:
        """The weights of a component that have outgrown what they are without LoRAs, and how many times."""
        base = self._base(self._parts[name])
        for scale, want in change.lora.items():
            if want.suffix == WEIGHT_SCALE and want.addends:
                plain = Wanted(base[scale], want.shape) if scale in base else replace(want, addends=())
                merged, unmerged = (
                    to_float32(np.concatenate([*pieces(one, SCALE)]), SCALE).reshape(want.shape[0], -1).max(axis=1)
                    for one in (Wanted(change.moved[scale], want.shape), plain)
                )
                if (times := float((merged / unmerged).max())) > OUTGROWN:
                    yield scale.removesuffix(WEIGHT_SCALE), times

    def _exact(
        self, component: Component, base: Mapping[str, TensorInfo], source: str, tensor: str, shape: tuple[int, ...]
    ) -> TensorInfo:
        """Where a tensor lies without LoRAs as the checkpoint has it, or wider: in the bundle, or in the checkpoint."""
        info = base.get(tensor)
        # What is not in the bundle's own folder is the checkpoint's, linked.
        if info and (info.file.parent != self._bundle.root or info.dtype == "float32"):
            return info
        return self._file(component.base).get(tensor) or self._origin.tensor(source, tensor, shape)

    def _base(self, component: Component) -> dict[str, TensorInfo]:
        """A component's tensors in the files that hold nothing merged."""
        return {
            tensor: info
            for file in component.weights
            if file != component.lora
            for tensor, info in self._file(file).items()
        }

    def _file(self, name: str | None) -> dict[str, TensorInfo]:
        """What a weight file of the bundle holds; its header is read once."""
        if name is None:
            return {}
        if name not in self._headers:
            self._headers[name] = read_header(self._bundle.file(name))
        return self._headers[name]

    def _check_space(self, folder: Path) -> None:
        free = shutil.disk_usage(folder).free
        if self.written > free:
            raise OutputError(
                f"{folder.parent} has {free / 1e9:.1f} GB free, and the swap needs {self.written / 1e9:.1f} GB",
                "free some space",
            )

    def manifest(self, folder: Path, merged: Merge, settings: known.Recommendation) -> Manifest:
        """The new manifest; engines that became stale are left out of a new bundle."""
        old = self._bundle.manifest
        components = dict(old.components)
        gone: set[str] = set()
        for change in self._changes.values():
            lora = change.files.get("lora")
            for name, graphs in change.graphs.items():
                component = old.components[name]
                new = msgspec.structs.replace(
                    component,
                    weights=(*(file for file in component.weights if file != component.lora), *_some(lora)),
                    graphs=graphs,
                    lora=lora,
                    base=change.files.get("base", component.base),
                )
                gone |= set(_files(component)) - set(_files(new))
                components[name] = new
        made = [
            file
            for change in self._changes.values()
            for files in (change.files, *change.graphs.values())
            for file in files.values()
        ]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = pool.map(lambda file: sha256(folder / file), made)
            records = {f: FileRecord((folder / f).stat().st_size, d) for f, d in zip(made, digests, strict=True)}
        base = _base_settings(old)
        new_manifest = msgspec.structs.replace(
            old,
            components=components,
            files={file: record for file, record in old.files.items() if file not in gone} | records,
            defaults=settings.defaults,
            scheduler=dict(settings.scheduler),
            loras=merged.loras,
            base_defaults=base.defaults if settings != base else None,
            base_scheduler=dict(base.scheduler) if settings != base else None,
            cost=None,  # It was that of other weights.
        )
        now = {name: Bundle(folder, new_manifest).source_hash(name) for name in {e.component for e in old.engines}}
        engines = [self._engine(engine, now[engine.component]) for engine in old.engines]
        stale = [engine for engine in engines if engine.serves != now[engine.component]]
        self.stale = tuple(stale)
        self.refitted = tuple(dict.fromkeys(e.component for e in engines if e.refit and e not in stale))
        if folder != self._bundle.root:
            engines = [engine for engine in engines if engine not in stale]
        dropped = {file for engine in old.engines for file in engine.files} - {f for e in engines for f in e.files}
        return msgspec.structs.replace(
            new_manifest,
            engines=tuple(engines),
            files={file: record for file, record in new_manifest.files.items() if file not in dropped},
        )

    def _engine(self, engine: CompiledEngine, now: str) -> CompiledEngine:
        """The entry of an engine for the new weights; where it does not serve them it stays as it is."""
        if engine.source == now:
            return msgspec.structs.replace(engine, refit=None)
        component = self._bundle.component(engine.component)
        change = self._changes.get(component.variant_of or engine.component)
        if change is None or not engine.refittable or engine.serves != self._bundle.source_hash(engine.component):
            return engine
        if any(tensor.endswith(WEIGHT_SCALE) for tensor in change.moved):
            return engine  # Nobody has seen TensorRT exchange quantized weights and their scales.
        own = _initializers(next(iter(self._graphs[engine.component].values())))
        tensors = (change.moved.keys() & set(own)) | set(engine.refit.tensors if engine.refit else ())
        return msgspec.structs.replace(engine, refit=Refit(now, tuple(sorted(tensors))))

    def link_others(self, manifest: Manifest, folder: Path) -> None:
        """Hard-link what the new bundle shares with the old one; across disks, copy it."""
        for name in manifest.files:
            if not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(self._bundle.file(name).resolve(), folder / name)
                except OSError:
                    shutil.copyfile(self._bundle.file(name), folder / name)


def _files(component: Component) -> Iterator[str]:
    yield from component.weights
    yield from component.graphs.values()
    yield from _some(component.base)


def _some(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)


def _renamed(want: Wanted, name: str) -> Wanted:
    """The same under the bundle's name, where the checkpoint at hand stores it under another one."""
    return replace(want, source=replace(want.source, name=name))


def _read_graph(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own
        raise BundleError(f"{path} is not an ONNX model ({error})", "build the bundle again") from None


def _initializers(graph: onnx.ModelProto) -> list[str]:
    """The names of the tensors that lie in weight files."""
    external = onnx.TensorProto.EXTERNAL
    return [tensor.name for tensor in graph.graph.initializer if tensor.data_location == external]


def _point_to(graph: onnx.ModelProto, places: Mapping[str, TensorInfo], folders: Sequence[Path]) -> None:
    """Change where initializers lie: in one of these folders, which are the bundle's as it is and as it will be."""
    for tensor in graph.graph.initializer:
        if (info := places.get(tensor.name)) is None:
            continue
        if _as_stored(tensor) != (info.dtype, info.shape):
            raise BundleError(f"{tensor.name} is {info.dtype} {info.shape}, as the graph has it not", "build it again")
        folder = next(folder for folder in folders if info.file.is_relative_to(folder))
        location = info.file.relative_to(folder).as_posix()
        values = {"location": location, "offset": str(info.offset), "length": str(info.nbytes)}
        for entry in tensor.external_data:
            entry.value = values.pop(entry.key, entry.value)
        for key, value in values.items():
            tensor.external_data.add(key=key, value=value)


def _as_stored(tensor: onnx.TensorProto) -> tuple[str, tuple[int, ...]]:
    """The element type and shape of an initializer in a weight file, where two numbers of four bits share a byte."""
    if tensor.data_type == onnx.TensorProto.INT4:
        *rows, width = tensor.dims
        return "uint8", (*rows, width // 2)
    return BY_ONNX[tensor.data_type].name, tuple(tensor.dims)
