"""LoRAs for the branch of the prompt alone: what they touch lies in one more file, and graphs of their own point there.

Nothing is traced for that, and what they do not touch is there once.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping

import msgspec

from zimgkit.engines.bundle import POSITIVE, Bundle, Component, FileRecord, Manifest, MergedLora, sha256
from zimgkit.engines.errors import LoraError, OutputError, UsageError
from zimgkit.engines.files import flush
from zimgkit.export.lora.graphs import initializers, point_to, read_graph
from zimgkit.export.quantization.quantized_weights import as_stored
from zimgkit.export.weights.layout import graph_name, positive_name
from zimgkit.export.weights.stream import Progress, Wanted, write_wanted, written_bytes
from zimgkit.runtime.progress import Report, silent

Wants = Mapping[str, Mapping[str, Wanted]]
"""Component -> tensor -> the float weight with all LoRAs of that branch, under its name in the bundle."""


def refuse_beside_controlnets(loras: Collection[object], controlnets: Collection[object]) -> None:
    """Refuse a bundle with both LoRAs for one branch and ControlNets: nobody has said how both act.

    Raises:
        UsageError: it would have both.
    """
    if loras and controlnets:
        raise UsageError(
            "a LoRA for the branch of the prompt alone and a ControlNet cannot be in one bundle",
            "merge the LoRA with --lora, or build two bundles",
        )


def give_positive(
    bundle: Bundle, wants: Wants, loras: tuple[MergedLora, ...], suffix: str = "", report: Report = silent
) -> tuple[Manifest, int]:
    """Write what LoRAs for the branch of the prompt make of a bundle into its folder.

    Args:
        bundle: one that has none, its files in its folder.
        wants: what they touch.
        loras: they.
        suffix: of the new files' names.
        report: called with (stage, done, total).

    Returns:
        The manifest with them, which is not written, and how many bytes of weights were.

    Raises:
        LoraError: they touch what both branches share, or have NaN or Inf with the weights.
        CheckpointError: the weights have.
        OutputError: the disk has no room.
    """
    manifest, root = bundle.manifest, bundle.root
    for name, tensors in wants.items():
        if tensors and not bundle.component(name).graphs:
            raise LoraError(
                f"{loras[0].source} changes {next(iter(tensors))}, which both branches of guidance share",
                "it cannot be for the branch of the prompt alone: merge it with --lora",
            )
    stored = {name: as_stored(bundle, name, tensors) for name, tensors in wants.items() if tensors}
    jobs = {
        name: {key: (want, want.dtype(manifest.precision)) for key, want in tensors.items()}
        for name, tensors in stored.items()
    }
    total = sum(written_bytes(want, dtype) for job in jobs.values() for want, dtype in job.values())
    if total > (free := shutil.disk_usage(root).free):
        raise OutputError(
            f"{root.parent} has {free / 1e9:.1f} GB free, and the LoRAs for one branch need {total / 1e9:.1f} GB",
            "free some space",
        )
    progress = Progress(total, lambda done, whole: report("weights", done, whole))
    components: dict[str, Component] = {}
    for name, job in jobs.items():
        file = positive_name(name, suffix)
        places = write_wanted(root / file, job, progress)
        flush(root / file)
        for member in (name, *manifest.variants(name)):
            component, graphs = manifest.components[member], {}
            for compute, graph_file in component.graphs.items():
                graph = read_graph(bundle.file(graph_file))
                if places.keys().isdisjoint(initializers(graph)):
                    continue  # A piece of a denoiser that none of them touches.
                point_to(graph, places, (root,))
                graphs[compute] = graph_name(member + POSITIVE, compute, manifest.precision, suffix)
                (root / graphs[compute]).write_bytes(graph.SerializeToString(deterministic=True))
                flush(root / graphs[compute])
            if graphs:
                components[member + POSITIVE] = msgspec.structs.replace(
                    component, weights=(*component.weights, file), graphs=graphs, lora=None, base=None, variant_of=name
                )
    made = {file for entry in components.values() for file in (entry.weights[-1], *entry.graphs.values())}
    records = {file: FileRecord((root / file).stat().st_size, sha256(root / file)) for file in sorted(made)}
    new = msgspec.structs.replace(
        manifest,
        components=manifest.components | components,
        files=manifest.files | records,
        positive_loras=loras,
        cost=None,  # It was that of other weights.
        caches=manifest.unmeasured_caches,
    )
    return new, total
