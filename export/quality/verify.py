"""Check a bundle against its checkpoint: every hash, every weight, every network's output, and its precision's cost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from zimgkit.engines.base import open_engine
from zimgkit.engines.bundle import POSITIVE, Bundle, Control, Cost, write_manifest
from zimgkit.engines.bundle.locks import only_writer_of
from zimgkit.engines.errors import BundleError
from zimgkit.engines.tensors.safetensors import TensorInfo
from zimgkit.export.attachments.control import controlled, prefix
from zimgkit.export.checkpoints.checkpoint import Checkpoint, open_origin
from zimgkit.export.components import parts_of, wanted_by
from zimgkit.export.controls.nets import DENOISER, ENCODED, open_nets
from zimgkit.export.lora.merge import NOTHING, Merge, merge, read_loras
from zimgkit.export.lora.names import names_of
from zimgkit.export.networks.parts import Part
from zimgkit.export.networks.registry import QUANTIZED, is_carried
from zimgkit.export.quality.cost import baseline, measure, past_bound
from zimgkit.export.quality.judged import CAPTIONS, accuracy
from zimgkit.export.quality.references import references
from zimgkit.export.quality.runs import Trial
from zimgkit.export.quantization.quantized_weights import as_stored
from zimgkit.export.weights.stream import Wanted, pieces
from zimgkit.runtime.commands.inspect import cost_lines
from zimgkit.runtime.progress import Report, silent

BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}
"""Element type of the weights -> the largest relative maximum error of a network that passes.

Rounding weights to bfloat16 alone changes the output of a deep network on random inputs by about a hundredth.
"""

LEAVE_MORE = "leave more linears unquantized with --recipe; zimg-export sensitivity proposes one"


@dataclass(frozen=True)
class Measuring:
    """How the cost of a bundle's precision is measured."""

    trial: Trial = field(default_factory=Trial)
    """The pictures that are compared."""
    references: tuple[Path, ...] = ()
    """Bundles of the same checkpoint in float32 and bfloat16; those that are missing are built temporarily."""
    backend: str = "onnxruntime"
    """The backend that runs the bundle; the reference bundles run in PyTorch."""
    device: str | None = None
    """The device of all runs."""
    captions: int | None = None
    """How many pictures are judged; None is :data:`.judged.CAPTIONS` of a demo model, and none of other checkpoints."""

    def __call__(self, folder: Path, checkpoint: Checkpoint, merged: Merge, report: Report = silent) -> Cost:
        """Measure the cost of a bundle's precision, and write it into the manifest.

        Args:
            folder: the bundle's.
            checkpoint: the one that the bundle was built from.
            merged: the LoRAs that were merged into it.
            report: called with (stage, done, total).

        Raises:
            ZimgError: a bundle cannot be run or compared; the manifest is unchanged.
        """
        bundle = Bundle.open(folder, verify=False)
        captions = self.captions
        if captions is None:
            captions = CAPTIONS if is_carried(bundle.manifest.name) else 0
        with references(checkpoint, merged, bundle.root, self.references, report) as found:
            trial = self.trial.filled(bundle.manifest)
            against = baseline(found, trial, device=self.device, report=report)
            cost = measure(bundle, against, backend=self.backend, device=self.device, report=report)
            if captions:
                own = accuracy(bundle.root, captions, self.backend, report)
                other = accuracy(found.float32.root, captions, "onnxruntime", report)
                cost = msgspec.structs.replace(cost, captions=captions, accuracy=own, float32_accuracy=other)
        write_manifest(bundle.root, msgspec.structs.replace(bundle.manifest, cost=cost))
        return cost


def verify(
    path: Path,
    model: str,
    *,
    revision: str | None = None,
    source: str = "huggingface",
    seed: int = 0,
    measuring: Measuring | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """Check a bundle against the checkpoint it was built from.

    Args:
        path: the bundle's folder.
        model: the checkpoint: a folder, a hub id or a short name.
        revision: branch, tag or commit on the hub.
        source: ``"huggingface"`` or ``"modelscope"``.
        seed: of the random inputs.
        measuring: how the cost of the precision is measured, which is then written into the bundle if all checks
            pass; None measures nothing.
        report: called with (stage, done, total).

    Returns:
        ``components``: by name, the number of ``tensors``, how many are ``different`` from the checkpoint's, and for
        those with a graph ``relative_max_error``: the largest absolute difference from the output of the PyTorch
        network in float32 over the largest absolute output; or ``not_run``, the reason why it was not compared.
        ``bound``: the largest error that passes. ``passed``. ``cost`` where it was measured, and ``past_bound``: why it
        is past the recipe's bound, or None.

    Raises:
        BundleError: the bundle is broken, or of another family than the checkpoint.
        CheckpointError: the checkpoint is broken, or a LoRA's file is missing.
        OutputError: the cost is to be written into a bundle of links, or a read-only one.
    """
    bundle = Bundle.read(path)
    if measuring is not None:
        bundle.check_changeable()
    bundle.verify(afresh=True, report=report)
    checkpoint = open_origin(bundle.manifest, model, revision, source)
    precision = bundle.manifest.precision
    if checkpoint.family != bundle.manifest.family:
        raise BundleError(
            f"{path} is of family {bundle.manifest.family}, and {model} of {checkpoint.family}",
            "name its own checkpoint",
        )
    merged = _merged(bundle, checkpoint, source)
    components: dict[str, Any] = {}
    parts = parts_of(checkpoint, bundle.manifest.tasks, ENCODED if bundle.manifest.controls else ())
    for index, (name, part) in enumerate(parts.items()):
        report("verify", index, len(parts))
        components |= _check(bundle, name, part, wanted_by(checkpoint.tensors, part, merged.addends), seed)
        if bundle.manifest.of_branch(name, positive=True) != name:
            wanted = wanted_by(checkpoint.tensors, part, merged.of_positive)
            components |= _check(bundle, name, part, wanted, seed, POSITIVE)
        for control in bundle.manifest.controls if name == DENOISER else ():
            wanted = as_stored(bundle, name, wanted_by(checkpoint.tensors, part, merged.addends))
            own, network = _controlled(bundle, control, part, checkpoint)
            kept = {key: components[name][key] for key in ("not_run",) if key in components[name]}
            compared = kept or _compare(bundle, control.component, network, wanted | own, seed)
            different = _different(bundle, control.component, own)
            components[control.component] = {"tensors": len(own), "different": different} | compared
    report("verify", len(parts), len(parts))
    bound = BOUNDS[precision]
    passed = all(not c["different"] and c.get("relative_max_error", 0.0) <= bound for c in components.values())
    found: dict[str, Any] = {}
    if measuring is not None and passed:
        with only_writer_of(bundle.root):
            cost = measuring(bundle.root, checkpoint, merged, report)
        found = {"cost": msgspec.to_builtins(cost), "past_bound": past_bound(bundle, cost)}
    return {
        "path": str(bundle.root),
        "precision": precision,
        "components": components,
        "bound": bound,
        "passed": passed,
    } | found


def _controlled(
    bundle: Bundle, control: Control, denoiser: Part, checkpoint: Checkpoint
) -> tuple[dict[str, Wanted], Part]:
    """What a ControlNet's file has, under its names beside the denoiser's, and both as one network."""
    name, before = control.name, prefix(control.name)
    place = bundle.manifest.sources[control.source].model
    (net,) = open_nets([f"{name}={place}"], checkpoint.family, checkpoint.config("transformer"))
    own = {
        before + key: replace(want, source=replace(want.source, name=before + want.source.name))
        for key, want in net.wanted().items()
    }
    plan = controlled(denoiser, {name: net.net}, torch.float32)
    network = replace(
        denoiser, network=plan.module, inputs=plan.inputs, outputs=plan.outputs, sizes=plan.sizes, variants={}
    )
    return own, network


def _check(
    bundle: Bundle, name: str, part: Part, wanted: Mapping[str, Wanted], seed: int, branch: str = ""
) -> dict[str, Any]:
    """What :func:`verify` finds of a component and of its variants, of those that end in ``branch``."""
    if name in QUANTIZED:
        wanted = as_stored(bundle, name, wanted)
    result: dict[str, Any] = {"tensors": len(wanted), "different": _different(bundle, name + branch, wanted)}
    if part.network is not None and name in QUANTIZED and bundle.manifest.quantization is not None:
        result["not_run"] = "the cost of quantization is measured on pictures, not on random inputs"
    elif part.network is not None:
        result |= _compare(bundle, name + branch, part, wanted, seed)
    found = {name + branch: result}
    for key, variant in part.variants.items() if "not_run" not in result else ():
        own, whole = {parameter: wanted[parameter] for parameter in variant.parameters()}, f"{name}.{key}{branch}"
        if whole in bundle.manifest.components or not branch:
            found[whole] = {"tensors": len(own), "different": 0} | _compare(bundle, whole, variant, own, seed)
    return found


def _merged(bundle: Bundle, checkpoint: Checkpoint, hub: str) -> Merge:
    """Read the bundle's LoRAs from their files again."""
    manifest = bundle.manifest
    entries = (*manifest.loras, *manifest.positive_loras)
    if not entries:
        return NOTHING
    loras = read_loras([f"{lora.source}:{lora.scale!r}" for lora in entries], hub)
    for lora, entry in zip(loras, entries, strict=True):
        if lora.sha256 != entry.sha256:
            raise BundleError(f"{entry.source} is not the LoRA that {bundle.root} has", "put the file back")
    both, own = loras[: len(manifest.loras)], loras[len(manifest.loras) :]
    return merge(both, names_of(checkpoint), checkpoint.family, own, allow_unmatched=True)


def verification_text(result: Mapping[str, Any]) -> str:
    """Format the result of :func:`verify` for people."""
    lines, width = [], max(14, *(len(name) + 1 for name in result["components"]))
    for name, entry in result["components"].items():
        same = entry["tensors"] - entry["different"]
        line = f"{name:<{width}}{same} of {entry['tensors']} weights are the checkpoint's"
        if "relative_max_error" in entry:
            line += f", relative maximum error {entry['relative_max_error']:.2e}"
        if "not_run" in entry:
            line += f", network not compared: {entry['not_run']}"
        lines.append(line)
    lines.extend(cost_lines(result["cost"]) if "cost" in result else ())
    lines.append(f"{'passed' if result['passed'] else 'FAILED'} (bound {result['bound']:g} for {result['precision']})")
    return "\n".join(lines)


def refuse_failures(result: Mapping[str, Any], *, strict: bool = False) -> None:
    """Turn a failed check into an error.

    Args:
        result: of :func:`verify`.
        strict: whether a cost past the recipe's bound is a failure as well.

    Raises:
        BundleError: the check failed.
    """
    if not result["passed"]:
        raise BundleError(f"{result['path']} is not what the checkpoint makes", "build it again")
    if strict and result.get("past_bound"):
        raise BundleError(result["past_bound"], LEAVE_MORE)


def _different(bundle: Bundle, component: str, wanted: Mapping[str, Wanted]) -> int:
    """Count the weights that are not what the checkpoint's tensors become when the bundle is built."""
    tensors = bundle.tensors(component)
    return sum(not _same(want, tensors, bundle.manifest.precision) for want in wanted.values())


def _same(want: Wanted, tensors: Mapping[str, Any], precision: str) -> bool:
    info = tensors.get(want.name)
    if info is None or info.shape != want.shape or info.dtype != want.dtype(precision):
        return False
    own = want.source
    is_kept = isinstance(own, TensorInfo) and want.is_kept(precision) and info.offset == own.offset
    if is_kept and info.file.samefile(own.file):
        return True
    with info.file.open("rb") as file:
        file.seek(info.offset)
        return all(
            np.array_equal(expected.reshape(-1), np.fromfile(file, expected.dtype, expected.size))
            for expected in pieces(want, precision)
        )


def _compare(bundle: Bundle, name: str, part: Part, wanted: Mapping[str, Wanted], seed: int) -> dict[str, Any]:
    """Run a component's graph and the PyTorch network on the same random inputs, and compare their outputs."""
    needed = 8 * sum(int(np.prod(want.shape)) for want in wanted.values())
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        return {"not_run": f"it needs {needed / 1e9:.0f} GB of memory, and {available / 1e9:.0f} GB are free"}
    feeds = _random_inputs(part, seed)
    network = part.build(torch.float32)
    network.load_state_dict({key: torch.from_numpy(_values(want)) for key, want in wanted.items()}, assign=True)
    with torch.inference_mode():
        given = network(*(torch.from_numpy(value) for value in feeds.values()))
    expected = [value.float().numpy() for value in (given if isinstance(given, tuple) else (given,))]
    del network
    engine = open_engine(bundle, name)
    try:
        results = engine.run(feeds)
    finally:
        engine.close()
    found = [results[output].astype(np.float32) for output in part.outputs]
    errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True)]
    return {"relative_max_error": float(max(errors))}


def _values(want: Wanted) -> NDArray[np.float32]:
    return np.concatenate([*pieces(want, "float32")]).reshape(want.shape)


def _random_inputs(part: Part, seed: int) -> dict[str, NDArray[Any]]:
    """Draw inputs of the traced shapes: normal numbers, cosines and sines of the same angles, ids of the vocabulary."""
    rng = np.random.default_rng(seed)
    vocabulary = part.parameters().get("embed_tokens.weight", (1,))[0]
    places = min(part.sizes[0].values())  # Of whatever an index is into, there are so many.
    feeds: dict[str, NDArray[Any]] = {}
    angles: NDArray[np.float32] | None = None
    for entry in part.inputs:
        shape = tuple(entry.example(part.sizes[0]).shape)
        if entry.dtype == torch.int64:
            feeds[entry.name] = rng.integers(0, vocabulary if entry.name == "input_ids" else places, shape)
        elif entry.dtype == torch.bool:
            feeds[entry.name] = np.broadcast_to(np.arange(shape[-1]) >= shape[-1] - 3, shape).copy()
        elif entry.name in ("cos", "sin"):
            angles = rng.uniform(0, 6, shape).astype(np.float32) if angles is None else angles
            feeds[entry.name] = np.cos(angles) if entry.name == "cos" else np.sin(angles)
        else:
            feeds[entry.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds
