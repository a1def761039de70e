"""``zimg-export build``: build a bundle from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zimgkit.engines.errors import UsageError, ZimgError
from zimgkit.export.cli import compile_options, quantization_options
from zimgkit.export.cli.compile import compiled_data, compiled_text
from zimgkit.export.cli.extras import need_export
from zimgkit.export.cli.headings import ExportCommand
from zimgkit.export.cli.options import (
    ALLOW_UNMATCHED,
    COMPILED_BACKENDS,
    CONTROLNETS,
    FILE,
    GUIDANCE,
    KEEP_BASE,
    LORA,
    POSITIVE_LORA,
    QUANTIZED,
    REVISION,
    SOURCE,
    STEPS,
    TASKS,
    chosen_parts,
    parts_options,
)
from zimgkit.runtime.commands import console
from zimgkit.runtime.commands.options import AS_JSON, QUIET


@click.command("build", cls=ExportCommand)
@click.option(
    "--model",
    required=True,
    help="The checkpoint: a folder in the diffusers layout, a hub id, its URL, a short name, or a weight file.",
)
@parts_options
@click.option("-o", "--out", required=True, type=FILE, help="The folder of the new bundle.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", *QUANTIZED, "keep", "auto"]),
    default="bf16",
    show_default=True,
    help="The precision of the weights; fp8 and int8 quantize the inputs of linears too, after a calibration. keep is "
    "that of the files: their own integers and scales where a bundle can have them.",
)
@click.option(
    "--card",
    type=click.Choice(["rtx4090", "h100", "cpu"]),
    help="The GPU that --precision auto is to suit, or cpu. [default: this machine's]",
)
@quantization_options.build_options
@REVISION
@SOURCE
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
@LORA
@POSITIVE_LORA
@KEEP_BASE
@ALLOW_UNMATCHED
@STEPS
@GUIDANCE
@TASKS
@CONTROLNETS
@click.option(
    "--cut-denoiser", is_flag=True, help="Also write the denoiser's head, body and tail as graphs, for block caching."
)
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", *COMPILED_BACKENDS]),
    default="onnxruntime",
    show_default=True,
    help="What will run the bundle; all but onnxruntime compile engines, with the options below.",
)
@compile_options.compile_options
@QUIET
@AS_JSON
def build_command(
    model: str,
    base: str | None,
    transformer: Path | None,
    text_encoder: Path | None,
    vae: Path | None,
    out: Path,
    precision: str,
    card: str | None,
    revision: str | None,
    source: str,
    overwrite: bool,
    loras: tuple[str, ...],
    positive_only_loras: tuple[str, ...],
    keep_base: bool,
    allow_unmatched: bool,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    tasks: tuple[str, ...],
    controlnets: tuple[str, ...],
    cut_denoiser: bool,
    backend: str,
    detailed: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Build a bundle from a checkpoint, with LoRAs merged and engines compiled for it where asked."""
    need_export()
    from zimgkit.export.build import build
    from zimgkit.runtime.commands.inspect import bundle_summary, bundle_text
    from zimgkit.runtime.progress import bar

    precision = _precision(precision, card)
    quantization = quantization_options.quantizing(precision, options)
    compilation = compile_options.compile_arguments(**options)
    compiled = None
    if backend in COMPILED_BACKENDS:
        from zimgkit.export.compilers.compile import check_ready, compile_bundle

        check_ready(backend)  # What is missing is better said now than after the download.
    elif option := compile_options.first_given(click.get_current_context()):
        raise UsageError(f"{option} is for engines", "add --backend tensorrt")
    root, files = chosen_parts(model, base, transformer, text_encoder, vae)
    with bar(enabled=not quiet) as report:
        bundle = build(
            root,
            out,
            precision=precision,
            quantization=quantization,
            revision=revision,
            source=source,
            overwrite=overwrite,
            loras=loras,
            positive_only_loras=positive_only_loras,
            keep_base=keep_base,
            allow_unmatched=allow_unmatched,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            cut_denoiser=cut_denoiser,
            tasks=tasks,
            controlnets=controlnets,
            files=files,
            report=report,
            say=lambda line: console.note(line, quiet=quiet),
        )
        if backend in COMPILED_BACKENDS:
            try:
                compiled = compile_bundle(bundle.root, backend=backend, **compilation, report=report)
            except ZimgError as error:
                retry = f"the bundle is whole without it: zimg-export compile {out} tries again"
                raise type(error)(error.message, f"{error.hint}; {retry}" if error.hint else retry) from None
    summary = bundle_summary(bundle.root)
    if as_json:
        console.print_json(summary)
        return
    click.echo(bundle_text(summary))
    if compiled:
        click.echo(compiled_text(compiled_data(bundle.root, compiled, detailed=detailed)))


def _precision(precision: str, card: str | None) -> str:
    """The precision that ``--precision`` names; of ``auto`` the one that suits the card, which is printed."""
    if precision == "auto":
        from zimgkit.export.compilers.cards import precision_for

        precision, reason = precision_for(card)
        click.echo(f"precision {precision}: {reason}", err=True)
    elif card is not None:
        raise UsageError("--card is for --precision auto")
    return precision
