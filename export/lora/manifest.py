"""The manifest of a bundle after its LoRAs were exchanged: other files, and engines that are stale or take them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from zimgkit.engines.bundle import Bundle, CompiledEngine, Component, FileRecord, Manifest, Refit, sha256
from zimgkit.export.lora.changes import Change, Changeable
from zimgkit.export.lora.graphs import initializers
from zimgkit.export.lora.known import Recommendation
from zimgkit.export.lora.merge import Merge
from zimgkit.export.quantization.quantized_weights import WEIGHT_SCALE


@dataclass(frozen=True)
class Changed:
    """A manifest, and what became of the engines."""

    manifest: Manifest
    stale: tuple[CompiledEngine, ...]
    """Engines that were compiled from other weights than the bundle has now."""
    refitted: tuple[str, ...]
    """Components whose engines take the weights they have now whenever they are loaded."""


def base_settings(manifest: Manifest) -> Recommendation:
    """What a bundle recommends without LoRAs."""
    return Recommendation(
        manifest.base_defaults or manifest.defaults,
        manifest.scheduler if manifest.base_scheduler is None else manifest.base_scheduler,
    )


def changed_manifest(
    bundle: Bundle,
    changeable: Changeable,
    changes: Mapping[str, Change],
    folder: Path,
    merged: Merge,
    settings: Recommendation,
) -> Changed:
    """Make the new manifest; engines that became stale are left out of a new bundle.

    Args:
        bundle: as it was.
        changeable: its components.
        changes: component -> what became of it, after it was written.
        folder: where the new files lie: the bundle's own, or a new one.
        merged: what the new set of LoRAs does.
        settings: what the bundle recommends with them.
    """
    old = bundle.manifest
    components = dict(old.components)
    gone: set[str] = set()
    for change in changes.values():
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
    base = base_settings(old)
    new_manifest = msgspec.structs.replace(
        old,
        components=components,
        files={file: record for file, record in old.files.items() if file not in gone} | _records(folder, changes),
        defaults=settings.defaults,
        scheduler=dict(settings.scheduler),
        loras=merged.loras,
        base_defaults=base.defaults if settings != base else None,
        base_scheduler=dict(base.scheduler) if settings != base else None,
        cost=None,  # It was that of other weights.
        caches=old.unmeasured_caches,
    )
    now = {name: Bundle(folder, new_manifest).source_hash(name) for name in {e.component for e in old.engines}}
    engines = [_engine(bundle, changeable, changes, engine, now[engine.component]) for engine in old.engines]
    stale = [engine for engine in engines if engine.serves != now[engine.component]]
    refitted = dict.fromkeys(e.component for e in engines if e.refit and e not in stale)
    if folder != bundle.root:
        engines = [engine for engine in engines if engine not in stale]
    dropped = {file for engine in old.engines for file in engine.files} - {f for e in engines for f in e.files}
    new_manifest = msgspec.structs.replace(
        new_manifest,
        engines=tuple(engines),
        files={file: record for file, record in new_manifest.files.items() if file not in dropped},
    )
    return Changed(new_manifest, tuple(stale), tuple(refitted))


def _records(folder: Path, changes: Mapping[str, Change]) -> dict[str, FileRecord]:
    """The sizes and hashes of the new files."""
    made = [
        file
        for change in changes.values()
        for files in (change.files, *change.graphs.values())
        for file in files.values()
    ]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda file: sha256(folder / file), made)
        return {f: FileRecord((folder / f).stat().st_size, d) for f, d in zip(made, digests, strict=True)}


def _engine(
    bundle: Bundle, changeable: Changeable, changes: Mapping[str, Change], engine: CompiledEngine, now: str
) -> CompiledEngine:
    """The entry of an engine for the new weights; where it does not serve them it stays as it is."""
    if engine.source == now:
        return msgspec.structs.replace(engine, refit=None)
    component = bundle.component(engine.component)
    change = changes.get(component.variant_of or engine.component)
    if change is None or not engine.refittable or engine.serves != bundle.source_hash(engine.component):
        return engine
    if any(tensor.endswith(WEIGHT_SCALE) for tensor in change.moved):
        return engine  # Nobody has seen TensorRT exchange quantized weights and their scales.
    own = initializers(next(iter(changeable.graphs[engine.component].values())))
    tensors = (change.moved.keys() & set(own)) | set(engine.refit.tensors if engine.refit else ())
    return msgspec.structs.replace(engine, refit=Refit(now, tuple(sorted(tensors))))


def _files(component: Component) -> Iterator[str]:
    yield from component.weights
    yield from component.graphs.values()
    yield from _some(component.base)


def _some(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)
