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
from dataclasses import dataclass, replace
from pathlib import Path

from zimgkit.engines.bundle import POSITIVE, Bundle, CompiledEngine, Manifest, atomic_folder, write_manifest
from zimgkit.engines.bundle.locks import only_writer_of
from zimgkit.engines.errors import OutputError, UsageError
from zimgkit.engines.files import flush
from zimgkit.export.lora import known
from zimgkit.export.lora.changes import Change, Changeable
from zimgkit.export.lora.graphs import point_to
from zimgkit.export.lora.manifest import base_settings, changed_manifest
from zimgkit.export.lora.merge import NOTHING, merge, read_loras
from zimgkit.export.lora.origin import Origin
from zimgkit.export.lora.positive import give_positive, refuse_beside_controlnets
from zimgkit.export.networks.registry import LORA_SOURCES
from zimgkit.export.weights.layout import base_name, graph_name, lora_name
from zimgkit.export.weights.stream import Progress, Wanted, write_wanted, written_bytes
from zimgkit.runtime.progress import Report, silent

OWN = re.compile(
    rf"({'|'.join(LORA_SOURCES)})(\.\w+){{0,3}}(-[0-9a-f]{{8}})?\.(safetensors|onnx)|\.bundle\.json\.[0-9a-f]{{8}}\.part"
)
"""Files that a swap writes, or replaces."""


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
    """Quantized weights of which some row became larger than without LoRAs, more than
    :data:`zimgkit.export.lora.changes.OUTGROWN` times -> how many times, the largest first."""


def swap(
    path: Path,
    loras: Sequence[str],
    *,
    positive_only_loras: Sequence[str] = (),
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
        positive_only_loras: likewise, those for the branch of the prompt alone.
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
        whole = Bundle.open(path)
        if out is None:
            whole.check_changeable()
        refuse_beside_controlnets(positive_only_loras, whole.manifest.controls)
        had = [engine for engine in whole.manifest.engines if engine.component.endswith(POSITIVE)]
        bundle = replace(whole, manifest=whole.manifest.for_both())
        changeable = Changeable(bundle, Origin(bundle, model, revision, source))
        read, own = read_loras(loras, source), read_loras(positive_only_loras, source)
        family, merged = bundle.manifest.family, NOTHING
        if read or own:
            merged = merge(read, changeable.names, family, own, allow_unmatched=allow_unmatched)
        settings = known.recommendation_for(
            merged.loras,
            family,
            base_settings(bundle.manifest),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        with _place(whole, out, target, overwrite=overwrite) as folder:
            found = {name: changeable.change(name, merged, keep_base=keep_base) for name in changeable.parts}
            changes = {name: change for name, change in found.items() if change}
            written = _write(bundle, changeable, changes, folder, report)
            outgrown = [entry for name, change in changes.items() for entry in changeable.outgrown(name, change)]
            changed = changed_manifest(bundle, changeable, changes, folder, merged, settings)
            if out is not None:
                _link_others(bundle, changed.manifest, folder)
            manifest = changed.manifest
            if merged.positive:
                touched = {name: changeable.positive(name, merged) for name in changeable.parts}
                suffix, place = f"-{secrets.token_hex(4)}", Bundle(folder.resolve(), manifest)
                manifest, more = give_positive(place, touched, merged.positive_loras, suffix, report)
                written += more
            write_manifest(folder, manifest)
        result = Bundle.open(target, verify=False)
        result.trust()
    largest_first = dict(sorted(outgrown, key=lambda entry: -entry[1]))
    return Swapped(result, (*changed.stale, *had), changed.refitted, written, merged.ignored, largest_first)


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


def _write(bundle: Bundle, changeable: Changeable, changes: Mapping[str, Change], folder: Path, report: Report) -> int:
    """Write the new files of every component that changes into a folder; returns how many bytes of weights."""
    precision, suffix = bundle.manifest.precision, f"-{secrets.token_hex(4)}"
    jobs: list[tuple[Change, str, str, dict[str, tuple[Wanted, str]]]] = []
    for name, change in changes.items():
        merged_wants = {key: (want, want.dtype(precision)) for key, want in change.lora.items()}
        jobs.append((change, "lora", lora_name(name, suffix), merged_wants))
        base_wants = {key: (want, want.source.dtype) for key, want in change.base.items()}
        jobs.append((change, "base", base_name(name, suffix), base_wants))
    total = sum(written_bytes(want, dtype) for *_, wants in jobs for want, dtype in wants.values())
    _check_space(folder, total)
    progress = Progress(total, lambda done, total: report("weights", done, total))
    for change, role, file, wants in jobs:
        if wants:
            written = write_wanted(folder / file, wants, progress)
            flush(folder / file)
            change.files[role] = file
            change.moved |= written if role == "lora" else {}
    for name, change in changes.items():
        for member in changeable.members[name]:
            change.graphs[member] = {}
            for compute, graph in changeable.graphs[member].items():
                point_to(graph, change.moved, (folder, bundle.root))
                path = folder / graph_name(member, compute, precision, suffix)
                path.write_bytes(graph.SerializeToString(deterministic=True))
                flush(path)
                change.graphs[member][compute] = path.name
    return total


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, and the swap needs {needed / 1e9:.1f} GB",
            "free some space",
        )


def _link_others(bundle: Bundle, manifest: Manifest, folder: Path) -> None:
    """Hard-link what the new bundle shares with the old one; across disks, copy it."""
    for name in manifest.files:
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(bundle.file(name).resolve(), folder / name)
            except OSError:
                shutil.copyfile(bundle.file(name), folder / name)
