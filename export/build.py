"""Checkpoint to bundle, the whole way in one page."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import zimgkit
from zimgkit.engines.bundle import (
    SCHEMA_VERSION,
    Bundle,
    Component,
    Kept,
    Manifest,
    Quantization,
    atomic_folder,
    record_files,
    write_manifest,
)
from zimgkit.engines.bundle.locks import only_writer_of
from zimgkit.engines.errors import OutputError, UsageError
from zimgkit.engines.files import temporary_folder
from zimgkit.export.checkpoints import catalog
from zimgkit.export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from zimgkit.export.checkpoints.stored import Stored
from zimgkit.export.checkpoints.tokenizer import export_tokenizer
from zimgkit.export.components import parts_of, wanted_by
from zimgkit.export.controls.graphs import groups, write_controlled
from zimgkit.export.controls.nets import ENCODED, OpenNet, open_nets, places, role, unquantized
from zimgkit.export.lora import known
from zimgkit.export.lora.merge import NOTHING, Merge, merge, read_loras
from zimgkit.export.lora.names import names_of
from zimgkit.export.lora.positive import give_positive, refuse_beside_controlnets
from zimgkit.export.networks.registry import FAMILIES, QUANTIZED, references_of, tasks_of
from zimgkit.export.networks.text_encoder import language_part
from zimgkit.export.quantization.calibrate import (
    CalibrationSet,
    calibrate,
    load_finished,
    of_calibration,
    statistics_path,
)
from zimgkit.export.quantization.formats import SCHEMES
from zimgkit.export.quantization.graph_pass import quantize_graph
from zimgkit.export.quantization.keep import KEEP, kept_precision
from zimgkit.export.quantization.quantize import QuantizationSettings, Quantized, linear_weights, quantize
from zimgkit.export.quantization.recipe import Recipe, family_recipe
from zimgkit.export.quantization.statistics import Statistics
from zimgkit.export.weights.finite import LinkedTensors
from zimgkit.export.weights.stream import Wanted, export_weights, linkable, linked_from, written_bytes
from zimgkit.export.writing import write_component
from zimgkit.runtime import families
from zimgkit.runtime.diffusion.latents import vae_normalization
from zimgkit.runtime.diffusion.schedule import read_scheduler
from zimgkit.runtime.progress import Report, silent


@dataclass(frozen=True)
class Quantizing:
    """How a quantized bundle is built."""

    recipe: Recipe | None = None
    """Which linears stay as they are; the family's own recipe where None."""
    calibration: CalibrationSet | Statistics = field(default_factory=CalibrationSet)
    """What inputs are measured on where they are quantized, or what was measured."""
    from_bundle: Path | None = None
    """A float bundle of the same checkpoint to calibrate on; one is built for it where None."""
    range: str = "max"
    """Which range of inputs is represented: ``"max"``, ``"percentile"`` or ``"mse"``."""
    smooth: float | None = None
    """SmoothQuant's alpha; the precision's own where None."""
    device: str | None = None
    """What a calibration runs on, as torch names devices."""
    check: Callable[[Path, Checkpoint, Merge, Report], object] | None = None
    """Called with the finished folder, before it becomes the bundle; what it raises, the build fails with."""


def _quiet(line: str) -> None:
    """Say nothing."""


PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
"""Name on the command line -> element type of the weights."""

DENOISER = "denoiser"
TOOLS = ("torch", "transformers", "onnx-ir", "onnxscript")


def build(
    model: str,
    out: Path,
    *,
    precision: str = "bf16",
    quantization: Quantizing | None = None,
    revision: str | None = None,
    source: str = "huggingface",
    overwrite: bool = False,
    loras: Sequence[str] = (),
    keep_base: bool = False,
    allow_unmatched: bool = False,
    positive_only_loras: Sequence[str] = (),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    cut_denoiser: bool = False,
    tasks: Collection[str] = (),
    controlnets: Sequence[str] = (),
    base: str | None = None,
    files: Mapping[str, Path] | None = None,
    report: Report = silent,
    say: Callable[[str], object] = _quiet,
) -> Bundle:
    """Build a bundle.

    Args:
        model: a folder in the diffusers layout, a hub id, a short name or a weight file.
        out: the bundle's folder; it must not exist unless ``overwrite``.
        precision: ``"fp32"``, ``"bf16"``, one of :data:`zimgkit.export.quantization.formats.SCHEMES`, or ``"keep"`` for
            the files' own, see :mod:`zimgkit.export.quantization.keep`.
        quantization: how it is quantized, in those; by the family's recipe and, where it needs a calibration, with
            the default prompts when None.
        revision: branch, tag or commit on the hub.
        source: ``"huggingface"`` or ``"modelscope"``.
        overwrite: replace a bundle that is there.
        loras: LoRAs to merge, as :func:`zimgkit.export.lora.source.find_lora` takes them.
        keep_base: keep what they touch without them as well, so that another set needs no checkpoint.
        allow_unmatched: go on where a LoRA has modules that the checkpoint has not.
        positive_only_loras: likewise, for the branch of the prompt alone.
        num_inference_steps: another default than the checkpoint's or the LoRAs'.
        guidance_scale: likewise, as diffusers counts it.
        cut_denoiser: write the denoiser's head, body and tail as components of their own as well, over the same
            weights, for caches of blocks.
        tasks: what it shall be asked for beside pictures from text: ``"image-to-image"``, ``"inpaint"``.
        controlnets: ControlNets that it shall have, as :func:`zimgkit.export.controls.source.find_control` takes them.
        base: of a weight file, see :func:`zimgkit.export.checkpoints.checkpoint.open_checkpoint`.
        files: likewise, component -> its weight file.
        report: called with (stage, done, total) as the work goes on.
        say: called with lines that a user should know.

    Raises:
        ZimgError: whatever went wrong, in one line. Nothing is left behind then.
    """
    if precision not in (names := (*PRECISIONS, *SCHEMES, KEEP)):
        raise UsageError(f"no precision is called {precision!r}", f"choose one of {', '.join(names)}")
    refuse_beside_controlnets(positive_only_loras, controlnets)
    out = out.expanduser().absolute()
    with only_writer_of(out), atomic_folder(out, overwrite=overwrite) as folder:
        read, own = read_loras(loras, source), read_loras(positive_only_loras, source)
        checkpoint = open_checkpoint(model, revision=revision, source=source, base=base, files=files)
        found = NOTHING
        if read or own:
            found = merge(read, names_of(checkpoint), checkpoint.family, own, allow_unmatched=allow_unmatched)
        tasks = [*tasks, *known.tasks_for(found.loras, checkpoint.family)]
        nets = open_nets(controlnets, checkpoint.family, checkpoint.config("transformer"), source)
        tasks = tasks_of(checkpoint.family, checkpoint.pipeline, tasks)
        for note in checkpoint.notes(checkpoint.components):
            say(f"warning: {note}")
        scheme, keep = None, precision == KEEP
        if keep:
            precision, reason = kept_precision(_linears(checkpoint, tasks))
            say(f"precision {precision}: {reason}")
        if precision in SCHEMES:
            scheme = _settings(checkpoint, found, precision, quantization or Quantizing(), out, report, keep=keep)
        chosen = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        export(
            checkpoint,
            folder,
            PRECISIONS.get(precision, "bfloat16"),
            report,
            quantization=scheme,
            merged=found,
            keep_base=keep_base,
            chosen=chosen,
            cut_denoiser=cut_denoiser,
            tasks=tasks,
            nets=nets,
        )
        if scheme is not None and quantization is not None and quantization.check is not None:
            quantization.check(folder, checkpoint, found, report)
    bundle = Bundle.open(out, verify=False)
    bundle.trust()
    return bundle


def _linears(checkpoint: Checkpoint, tasks: Collection[str]) -> dict[str, list[Stored]]:
    """The weights of the linears of each component that can be quantized, as they are stored."""
    parts = {name: part for name, part in parts_of(checkpoint, tasks).items() if name in QUANTIZED}
    wanted = {name: wanted_by(checkpoint.tensors, part) for name, part in parts.items()}
    return {name: [wanted[name][linear].source for linear in linear_weights(part)] for name, part in parts.items()}


def _settings(
    checkpoint: Checkpoint, merged: Merge, precision: str, given: Quantizing, out: Path, report: Report, *, keep: bool
) -> QuantizationSettings:
    """How a checkpoint's linears are quantized, after a calibration where that is needed and not there yet."""
    if keep:
        # A file's maker has decided which linears it leaves.
        bounds = family_recipe(checkpoint.family, checkpoint.name).bounds
        return QuantizationSettings(precision, Recipe(bounds=bounds), keep=True)
    recipe = given.recipe or family_recipe(checkpoint.family, checkpoint.name)
    settings = QuantizationSettings(precision, recipe, range=given.range, smooth=given.smooth)
    settings.check()
    parts = parts_of(checkpoint, tasks_of(checkpoint.family, checkpoint.pipeline, ()))
    for name, part in parts.items():
        if name in QUANTIZED:
            # What is wrong is better said before hours of work.
            recipe.unquantized(precision, name, linear_weights(part))
    if settings.scheme.activations is None:
        return settings
    if isinstance(given.calibration, Statistics):
        return replace(settings, statistics=given.calibration)
    if given.from_bundle is not None:
        float_bundle = Bundle.open(given.from_bundle)
        if float_bundle.manifest.family != checkpoint.family:
            found = f"{given.from_bundle} is of family {float_bundle.manifest.family}"
            raise UsageError(f"{found}, and the checkpoint of {checkpoint.family}", "name a bundle of this checkpoint")
        found_at = statistics_path(float_bundle.root)
        statistics = calibrate(float_bundle, given.calibration, found_at, device=given.device, report=report)
        return replace(settings, statistics=statistics)
    known_statistics = load_finished(
        statistics_path(out),
        of_calibration(checkpoint.sources),
        merged.loras,
        given.calibration.filled(checkpoint.name),
    )
    if known_statistics is None:
        with temporary_folder(out, "float") as folder:
            export(checkpoint, folder, "bfloat16", report, merged=merged.for_both)
            float_bundle = Bundle.open(folder, verify=False)
            known_statistics = calibrate(
                float_bundle, given.calibration, statistics_path(out), device=given.device, report=report
            )
    return replace(settings, statistics=known_statistics)


def export(
    checkpoint: Checkpoint,
    folder: Path,
    precision: str,
    report: Report = silent,
    *,
    quantization: QuantizationSettings | None = None,
    merged: Merge = NOTHING,
    keep_base: bool = False,
    chosen: Mapping[str, Any] | None = None,
    cut_denoiser: bool = False,
    tasks: Collection[str] = (),
    nets: Sequence[OpenNet] = (),
) -> None:
    """Write a whole bundle into an empty folder.

    Args:
        checkpoint: an open checkpoint.
        folder: where to write.
        precision: the element type of the weights, ``"float32"`` or ``"bfloat16"``.
        report: called with (stage, done, total).
        quantization: how linears are quantized, where they are.
        merged: what LoRAs do to it.
        keep_base: keep what they touch without them as well.
        chosen: the user's own defaults, see :func:`zimgkit.export.lora.known.recommendation_for`.
        cut_denoiser: write the denoiser's head, body and tail as components as well.
        tasks: what it shall be asked for beside pictures from text.
        nets: ControlNets that it shall have.

    Raises:
        UsageError: the settings do not fit each other or the checkpoint.
        CheckpointError: the checkpoint is not what its configs say, or not one zimgkit serves, or has NaN or Inf.
        LoraError: what LoRAs make of it has NaN or Inf.
        OSError: the disk is full.
    """
    family = families.family(checkpoint.family)
    row = FAMILIES[checkpoint.family]
    tasks = tasks_of(checkpoint.family, checkpoint.pipeline, tasks)
    references = known.references_with(
        references_of(checkpoint.family, checkpoint.pipeline, checkpoint.name), merged.loras, checkpoint.family
    )
    config = {name: checkpoint.config(name) for name in checkpoint.components}
    config |= {row.processor: checkpoint.config(row.processor)} if references else {}
    config |= {role(net.name): dict(net.file.config) for net in nets if net.file.config}
    scheduler = checkpoint.config("scheduler")
    read_scheduler(scheduler)
    vae_normalization(config["vae"])
    defaults = catalog.defaults_for(checkpoint.root, checkpoint.family, scheduler, checkpoint.pipeline)
    base = known.Recommendation(defaults, scheduler)
    settings = known.recommendation_for(merged.loras, checkpoint.family, base, **(chosen or {}))
    parts = parts_of(checkpoint, tasks, ENCODED if nets else ())
    config |= {"text_encoder": language_part(config["text_encoder"], pictures=references is not None)}
    family(config, str(checkpoint.root))  # Better missed now than at the first picture.
    wanted = {name: wanted_by(checkpoint.tensors, part, merged.addends) for name, part in parts.items()}
    wanted |= {role(net.name): net.wanted() for net in nets}
    quantized: dict[str, Quantized] = {}
    if quantization is not None:
        quantization.check()
        present = [name for name in QUANTIZED if name in parts]
        for index, name in enumerate(present):
            report("quantize", index, len(present))
            quantized[name] = quantize(name, parts[name], wanted[name], quantization)
            wanted[name] = quantized[name].wanted
        report("quantize", len(present), len(present))
    text = export_tokenizer(
        checkpoint.root / "tokenizer",
        folder / "tokenizer",
        family.EDIT_TEXT if references else family.TEXT,
        chat_template=family.USES_CHAT_TEMPLATE and not references,
    )
    _check_space(wanted, precision, folder, keep_base=keep_base)
    placed = export_weights(
        wanted,
        precision,
        folder,
        lambda done, total: report("weights", done, total),
        keep_base=keep_base,
        places=places(nets),
    )
    components: dict[str, Component] = {}
    for index, (name, part) in enumerate(parts.items()):
        report("graphs", index, len(parts))
        rewrite = None
        if quantization is not None and name in quantized:
            rewrite = partial(quantize_graph, quantization.scheme, quantized[name].quantized, placed[name], folder)
        is_cut = cut_denoiser and name == DENOISER
        components |= write_component(name, part, placed[name], precision, folder, rewrite, is_cut=is_cut)
        if name == DENOISER and nets:
            own = {net.name: net.net for net in nets}
            components |= write_controlled(
                *(part, own, groups(own), components[name], placed[name]),
                {net.name: placed[role(net.name)] for net in nets},
                *(precision, folder, rewrite),
                is_cut=is_cut,
            )
    report("graphs", len(parts), len(parts))
    linked = LinkedTensors(linked_from(wanted, placed))
    files = record_files(folder, linked.look)
    linked.check()
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        zimgkit_version=zimgkit.__version__,
        family=checkpoint.family,
        name=checkpoint.name,
        precision=precision,
        tasks=tasks,
        references=references,
        layers=row.layered.get(checkpoint.pipeline),
        sources=checkpoint.sources | {role(net.name): net.source for net in nets},
        text=text,
        defaults=settings.defaults,
        scheduler=dict(settings.scheduler),
        config=config,
        components=components,
        files=files,
        controls=tuple(net.control() for net in nets),
        tools={name: metadata.version(name) for name in TOOLS},
        quantization=unquantized(_record(quantization, quantized), nets) if quantization is not None else None,
        loras=merged.loras,
        base_defaults=base.defaults if settings != base else None,
        base_scheduler=scheduler if settings != base else None,
    )
    if merged.positive:
        wants = {name: wanted_by(checkpoint.tensors, part, merged.positive) for name, part in parts.items()}
        touched = {name: {key: want for key, want in part.items() if want.addends} for name, part in wants.items()}
        manifest, _ = give_positive(Bundle(folder, manifest), touched, merged.positive_loras, report=report)
    write_manifest(folder, manifest)


def _record(settings: QuantizationSettings, quantized: Mapping[str, Quantized]) -> Quantization:
    """What the manifest says of how linears were quantized."""
    kept = {name: dict(entry.unquantized) for name, entry in quantized.items() if entry.unquantized}
    bounds = settings.recipe.bounds.get(settings.precision)
    bound = bounds.cosine if bounds else None
    what = {name: _kept(entry) for name, entry in quantized.items() if entry.quantized} if settings.keep else {}
    if settings.scheme.activations is None or settings.statistics is None:
        return Quantization(settings.precision, kept, bound=bound, kept=what)
    inputs = {name: dict(entry.inputs) for name, entry in quantized.items()}
    made = dict(settings.statistics.made)
    return Quantization(settings.precision, kept, inputs, settings.range, settings.alpha, made, bound)


def _kept(entry: Quantized) -> Kept:
    exact = len(entry.kept)
    return Kept(exact, len(entry.quantized) - exact, entry.rounding.relative if entry.rounding else 0.0)


def _check_space(wanted: Mapping[str, Mapping[str, Wanted]], precision: str, folder: Path, *, keep_base: bool) -> None:
    """Fail before the first gigabyte is written rather than after the last."""
    here = folder.stat().st_dev
    linked = {
        file
        for file, may in linkable(wanted, precision, keep_base=keep_base).items()
        if may and file.resolve().stat().st_dev == here
    }
    wants = [want for part in wanted.values() for want in part.values()]
    needed = sum(written_bytes(want, precision) for want in wants if want.addends or want.source.file not in linked)
    if keep_base:
        bases = [want for want in wants if want.addends and not want.suffix and want.source.file not in linked]
        needed += sum(want.source.nbytes for want in bases)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, and the bundle needs {needed / 1e9:.1f} GB",
            "free some space, or name a folder on another disk",
        )
