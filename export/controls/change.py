"""ControlNets put into a bundle that is built, and taken out again: nothing that is there is traced, copied or read.

New files are written under names that none has, then the manifest is replaced in one step: until then the old bundle is
whole, from then on the new one.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec

from zimgkit.engines.bundle import Bundle, Component, FileRecord, Manifest, sha256, write_manifest
from zimgkit.engines.bundle.locks import only_writer_of
from zimgkit.engines.errors import OutputError, UsageError
from zimgkit.engines.files import flush
from zimgkit.engines.tensors.safetensors import TensorInfo
from zimgkit.export.attachments.control import prefix
from zimgkit.export.checkpoints.layouts import canonical
from zimgkit.export.components import parts_of, wanted_by
from zimgkit.export.controls.graphs import groups, write_controlled
from zimgkit.export.controls.nets import (
    COMPONENT,
    DENOISER,
    ENCODED,
    open_nets,
    places,
    role,
    trained_shapes,
    unquantized,
)
from zimgkit.export.lora.origin import Origin
from zimgkit.export.lora.positive import refuse_beside_controlnets
from zimgkit.export.networks.parts import ControlNet, Part
from zimgkit.export.networks.registry import control_net, is_needed, parts
from zimgkit.export.quantization.formats import SCHEMES
from zimgkit.export.quantization.graph_pass import quantize_graph
from zimgkit.export.quantization.quantized_weights import WEIGHT_SCALE
from zimgkit.export.weights.finite import LinkedTensors
from zimgkit.export.weights.stream import Wanted, export_weights, linked_from
from zimgkit.export.writing import Rewrite, write_component
from zimgkit.runtime.progress import Report, silent

OWN = re.compile(
    r"control/.*|(denoiser\.control|control|vae_encoder)\b.*\.(safetensors|onnx)(\.\w+\.part)?|\.bundle\.json\..*\.part"
)
"""Files that a change writes: one that is killed leaves some that the manifest does not name."""


@dataclass(frozen=True)
class Changed:
    """A bundle after a change."""

    bundle: Bundle
    uncompiled: tuple[str, ...]
    """Components that the bundle has engines beside, and none of."""


def add(
    path: Path,
    controlnets: Sequence[str],
    *,
    model: str | None = None,
    revision: str | None = None,
    source: str = "huggingface",
    report: Report = silent,
) -> Changed:
    """Put ControlNets into a bundle.

    Args:
        path: the bundle's folder.
        controlnets: see :func:`.source.find_control`.
        model: the checkpoint that it was built from, where that is not where it was; it is needed where the bundle has
            no VAE encoder.
        revision: of that, on the hub.
        source: the hub of the checkpoint and of the nets, ``"huggingface"`` or ``"modelscope"``.
        report: called with (stage, done, total).

    Raises:
        ZimgError: whatever went wrong, in one line. The bundle is as it was then.
    """
    with _changing(path) as bundle:
        manifest, root = bundle.manifest, bundle.root
        refuse_beside_controlnets(manifest.positive_loras, controlnets)
        config = manifest.config["transformer"]
        taken = [control.name for control in manifest.controls]
        new = open_nets(controlnets, manifest.family, config, source, taken)
        wanted: dict[str, Mapping[str, Wanted]] = {role(net.name): net.wanted() for net in new}
        encoders: dict[str, Part] = {}
        if missing := [name for name in ENCODED if name not in manifest.components]:
            origin = Origin(bundle, model, revision, source)
            checkpoint = origin.checkpoint_for("no VAE encoder")
            every = parts_of(checkpoint, manifest.tasks, ENCODED)
            encoders = {name: every[name] for name in missing}
            wanted |= {name: wanted_by(checkpoint.tensors, part) for name, part in encoders.items()}
        progress = partial(report, "weights")
        placed = export_weights(wanted, manifest.precision, root, progress, places=places(new))
        entries: dict[str, Component] = {}
        for name, part in encoders.items():
            entries |= write_component(name, part, placed[name], manifest.precision, root)
        report("graphs", 0, 1)
        nets = _nets(bundle) | {net.name: net.net for net in new}
        of_nets = {control.name: _tensors(bundle, control.name) for control in manifest.controls}
        of_nets |= {net.name: placed[role(net.name)] for net in new}
        graphs = {key: names for key, names in groups(nets).items() if {net.name for net in new} & {*names}}
        entries |= _write(bundle, nets, graphs, of_nets)
        report("graphs", 1, 1)
        linked = LinkedTensors(linked_from(wanted, placed))
        files = _records(root, entries, linked)
        linked.check()
        changes = msgspec.structs.replace(
            manifest,
            sources=manifest.sources | {role(net.name): net.source for net in new},
            config=manifest.config | {role(net.name): dict(net.file.config) for net in new if net.file.config},
            components=manifest.components | entries,
            controls=(*manifest.controls, *(net.control() for net in new)),
            quantization=manifest.quantization and unquantized(manifest.quantization, new),
            files=manifest.files | files,
        )
        return _replaced(bundle, changes, entries)


def remove(path: Path, names: Sequence[str], *, report: Report = silent) -> Changed:
    """Take ControlNets out of a bundle.

    Args:
        path: the bundle's folder.
        names: of the nets.
        report: called with (stage, done, total).

    Raises:
        ZimgError: whatever went wrong, in one line. The bundle is as it was then.
    """
    with _changing(path) as bundle:
        manifest, gone = bundle.manifest, {*names}
        has = [control.name for control in manifest.controls]
        if unknown := [name for name in names if name not in has]:
            hint = f"it has {', '.join(has)}" if has else "it has none"
            raise UsageError(f"{bundle.root} has no ControlNet {unknown[0]!r}", hint)
        nets = {name: net for name, net in _nets(bundle).items() if name not in gone}
        kept, before = groups(nets), groups(_nets(bundle))
        graphs = {key: names for key, names in kept.items() if before[key] != names}
        report("graphs", 0, 1)
        entries = _write(bundle, nets, graphs, {name: _tensors(bundle, name) for name in nets}) if graphs else {}
        report("graphs", 1, 1)
        dropped = [name for key in before if key not in kept for name in (key, *manifest.pieces(key))]
        if not nets:  # They were what it needed these for.
            dropped += [name for name in ENCODED if not is_needed(name, manifest.tasks)]
        roles = {role(name) for name in gone}
        quantization = manifest.quantization
        if quantization:
            rest = {key: linears for key, linears in quantization.unquantized.items() if key not in roles}
            quantization = msgspec.structs.replace(quantization, unquantized=rest)
        changes = msgspec.structs.replace(
            manifest,
            sources={key: source for key, source in manifest.sources.items() if key not in roles},
            config={key: config for key, config in manifest.config.items() if key not in roles},
            components={key: c for key, c in (manifest.components | entries).items() if key not in dropped},
            controls=tuple(control for control in manifest.controls if control.name not in gone),
            quantization=quantization,
            files=manifest.files | _records(bundle.root, entries),
        )
        return _replaced(bundle, changes, [*entries, *dropped])


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[Bundle]:
    """A bundle that nobody else changes meanwhile; afterwards it has no file that its manifest does not name."""
    path = path.expanduser().absolute()
    with only_writer_of(path):
        bundle = Bundle.open(path)
        bundle.check_changeable()
        _clear_strays(bundle)
        try:
            yield bundle
        except OSError as error:
            message = f"{bundle.root} cannot be written ({error.strerror or error})"
            raise OutputError(message, "free some space, or check its rights; the bundle is as it was") from None
        finally:
            _clear_strays(Bundle.open(path, verify=False))


def _clear_strays(bundle: Bundle) -> None:
    for file in sorted(bundle.root.rglob("*"), reverse=True):
        name = file.relative_to(bundle.root).as_posix()
        if OWN.fullmatch(name) and not file.is_dir() and name not in bundle.manifest.files:
            file.unlink(missing_ok=True)
        elif file.is_dir() and name.startswith("control") and not any(file.iterdir()):
            file.rmdir()
    if (folder := bundle.root / "control").is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _nets(bundle: Bundle) -> dict[str, ControlNet]:
    """The nets that a bundle has."""
    manifest, found = bundle.manifest, {}
    for control in manifest.controls:
        shapes = trained_shapes(manifest.family, _tensors(bundle, control.name))
        own = manifest.config.get(role(control.name), {})
        found[control.name] = control_net(
            manifest.family, manifest.config["transformer"], shapes, own, f"the ControlNet {control.name}"
        )
    return found


def _tensors(bundle: Bundle, name: str) -> dict[str, TensorInfo]:
    """A net's tensors, by the names that its file has."""
    before = prefix(name)
    component = next(control.component for control in bundle.manifest.controls if control.name == name)
    tensors = bundle.tensors(component).items()
    return {
        key.removeprefix(before): replace(info, name=key.removeprefix(before))
        for key, info in tensors
        if key.startswith(before)
    }


def _write(
    bundle: Bundle,
    nets: Mapping[str, ControlNet],
    wanted: Mapping[str, tuple[str, ...]],
    of_nets: Mapping[str, Mapping[str, TensorInfo]],
) -> dict[str, Component]:
    """Write the graphs of a denoiser with nets."""
    manifest = bundle.manifest
    part = parts(manifest.family, "transformer", manifest.config["transformer"], manifest.tasks)[DENOISER]
    tensors = {canonical(part.source, stored): info for stored, info in bundle.tensors(DENOISER).items()}
    return write_controlled(
        *(part, nets, wanted, bundle.component(DENOISER), tensors, of_nets, manifest.precision, bundle.root),
        _rewrite(bundle, part, tensors),
        is_cut=f"{DENOISER}.head" in manifest.components,
        suffix=f"-{secrets.token_hex(4)}",
    )


def _rewrite(bundle: Bundle, part: Part, tensors: Mapping[str, TensorInfo]) -> Rewrite | None:
    """What quantizes the graphs of a denoiser as the bundle's own is."""
    quantization = bundle.manifest.quantization
    if quantization is None:
        return None
    weights = [name for name in part.parameters() if name + WEIGHT_SCALE in tensors]
    return partial(quantize_graph, SCHEMES[quantization.precision], weights, tensors, bundle.root)


def _records(
    root: Path, entries: Mapping[str, Component], linked: LinkedTensors | None = None
) -> dict[str, FileRecord]:
    """The sizes and hashes of the files that are new."""
    known = Bundle.open(root, verify=False).manifest.files
    files = [file for entry in entries.values() for file in (*entry.weights, *entry.graphs.values())]
    found = {}
    for file in dict.fromkeys(files):
        if file not in known:
            flush(root / file)
            digest = sha256(root / file, look=linked.look if linked else None)
            found[file] = FileRecord((root / file).stat().st_size, digest)
    return found


def _replaced(bundle: Bundle, manifest: Manifest, changed: Collection[str]) -> Changed:
    """Put another manifest in the place of a bundle's, without the files and engines that nobody needs any more."""
    engines = tuple(engine for engine in manifest.engines if engine.component not in changed)
    dropped = {file for engine in manifest.engines if engine not in engines for file in engine.files}
    used = {file for entry in manifest.components.values() for file in _files(entry)}
    before = [bundle.manifest.components[name] for name in changed if name in bundle.manifest.components]
    old = {file for entry in before for file in _files(entry)}
    gone = dropped | (old - used)
    files = {file: record for file, record in manifest.files.items() if file not in gone}
    write_manifest(bundle.root, msgspec.structs.replace(manifest, engines=engines, files=files))
    for file in gone:
        (bundle.root / file).unlink(missing_ok=True)
    result = Bundle.open(bundle.root, verify=False)
    result.trust()
    compiled = {engine.component for engine in engines}
    uncompiled = [name for name in manifest.components if name.startswith(COMPONENT) and name not in compiled]
    uncompiled = [name for name in uncompiled if not manifest.is_piece(name)]
    return Changed(result, tuple(uncompiled) if compiled else ())


def _files(component: Component) -> Iterator[str]:
    yield from component.weights
    yield from component.graphs.values()
