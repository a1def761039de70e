"""``zimg-export``: bundles from checkpoints. Thin; the work is in ``build.py``, ``verify.py`` and ``demo.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import zimgkit
from zimgkit.engines.errors import OutputError, UsageError, ZimgError
from zimgkit.export.cli import compile as compile_cli
from zimgkit.export.cli import quantization as quantization_cli
from zimgkit.export.networks.registry import FAMILIES
from zimgkit.runtime import demo_models
from zimgkit.runtime.commands import console

if TYPE_CHECKING:
    from zimgkit.export.lora.swap import Swapped

SOURCES = click.Choice(["huggingface", "modelscope"])
SOURCE = click.option("--source", type=SOURCES, default="huggingface", show_default=True, help="The hub of a hub id.")
REVISION = click.option("--revision", help="Branch, tag or commit on the hub.")
QUIET = click.option("--quiet", is_flag=True, help="No progress bar.")
COMPILED = ["tensorrt", "tensorrt-rtx"]
"""Backends that engines are compiled for."""
LORA = click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="LORA[:SCALE]",
    help="A file, a folder or a hub's file (owner/name/file.safetensors) to merge; may be given several times.",
)
KEEP_BASE = click.option("--keep-base", is_flag=True, help="Keep base weights too: the next swap needs no checkpoint.")
ALLOW_UNMATCHED = click.option("--allow-unmatched", is_flag=True, help="Leave out what of a LoRA the model has not.")
STEPS = click.option("--num-inference-steps", type=int, help="Another default than the checkpoint's or the LoRA's.")
GUIDANCE = click.option("--guidance-scale", type=float, help="Likewise, as diffusers counts it.")
BUNDLE = click.argument(
    "bundle", type=click.Path(path_type=Path), callback=lambda _, __, value: demo_models.locate(value)
)
"""A bundle to read: a folder, or the name of one that zimgkit carries."""
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group("zimg-export", context_settings={"max_content_width": 110})
@click.version_option(zimgkit.__version__, message="%(version)s")
def cli() -> None:
    """Turn checkpoints into bundles that run without PyTorch."""


@cli.command()
@click.option("--model", required=True, help="A folder in the diffusers layout, a hub id, or a short name.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The bundle's folder.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", *quantization_cli.QUANTIZED, "auto"]),
    default="bf16",
    show_default=True,
    help="Of the weights; fp8 and int8 also of what is multiplied with them, which needs a calibration.",
)
@click.option(
    "--card", type=click.Choice(["rtx4090", "h100"]), help="For --precision auto, in place of this machine's."
)
@quantization_cli.options
@REVISION
@SOURCE
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
@LORA
@KEEP_BASE
@ALLOW_UNMATCHED
@STEPS
@GUIDANCE
@click.option("--cut-denoiser", is_flag=True, help="Also its head, body and tail as graphs of their own, for caches.")
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", *COMPILED]),
    default="onnxruntime",
    show_default=True,
    help="The others compile engines as well, with the options from --size on.",
)
@compile_cli.options
@QUIET
@AS_JSON
def build(
    model: str,
    out: Path,
    precision: str,
    card: str | None,
    revision: str | None,
    source: str,
    overwrite: bool,
    loras: tuple[str, ...],
    keep_base: bool,
    allow_unmatched: bool,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    cut_denoiser: bool,
    backend: str,
    detailed: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Build a bundle from a checkpoint, with LoRAs merged and engines compiled for it where asked."""
    _need_export()
    from zimgkit.export.build import build as work
    from zimgkit.runtime.commands.inspect import as_text, summary
    from zimgkit.runtime.progress import bar

    compiled = None
    if precision == "auto":
        from zimgkit.export.compilers.cards import precision_for

        precision, reason = precision_for(card)
        click.echo(f"precision {precision}: {reason}", err=True)
    elif card is not None:
        raise UsageError("--card is for --precision auto")
    quantizing = quantization_cli.take(precision, options)
    settings = compile_cli.settings(**options)
    if backend in COMPILED:
        from zimgkit.export.compilers.compile import check_ready, compile_bundle

        check_ready(backend)  # What is missing is better said now than after the download.
    elif given := compile_cli.given(click.get_current_context()):
        raise UsageError(f"{given} is for engines", "add --backend tensorrt")
    with bar(enabled=not quiet) as report:
        bundle = work(
            model,
            out,
            precision=precision,
            quantization=quantizing,
            revision=revision,
            source=source,
            overwrite=overwrite,
            loras=loras,
            keep_base=keep_base,
            allow_unmatched=allow_unmatched,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            cut_denoiser=cut_denoiser,
            report=report,
        )
        if backend in COMPILED:
            try:
                compiled = compile_bundle(bundle.root, backend=backend, **settings, report=report)
            except ZimgError as error:
                kept = f"the bundle is whole without it: zimg-export compile {out} tries again"
                raise type(error)(error.message, f"{error.hint}; {kept}" if error.hint else kept) from None
    result = summary(bundle.root)
    if as_json:
        console.print_json(result)
        return
    click.echo(as_text(result))
    if compiled:
        click.echo(compile_cli.as_text(compile_cli.as_data(bundle.root, compiled, detailed=detailed)))


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@quantization_cli.plan_options
@QUIET
def calibrate(bundle: Path, quiet: bool, **options: Any) -> None:
    """Measure what goes into the linears of a float bundle, for build --calibration of fp8 and int8.

    An interrupted calibration goes on where it was when it is started again.
    """
    _need_export()
    from zimgkit.engines.bundle import Bundle
    from zimgkit.export.quantization.calibrate import beside
    from zimgkit.export.quantization.calibrate import calibrate as work
    from zimgkit.runtime.progress import bar

    plan, device = quantization_cli.plan(**options)
    opened = Bundle.open(bundle)
    with bar(enabled=not quiet) as report:
        work(opened, plan, beside(opened.root), device=device, report=report)
    click.echo(beside(opened.root))


@cli.command(name="compile")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--backend", type=click.Choice(COMPILED), default="tensorrt", show_default=True, help="What shall run it."
)
@compile_cli.options
@QUIET
@AS_JSON
def compile_engines(bundle: Path, backend: str, detailed: bool, quiet: bool, as_json: bool, **compilation: Any) -> None:
    """Compile engines for a bundle that is there; what is up to date stays.

    One size compiles to the fastest engine. Several sizes, or one span of sizes, share an engine and its weights:

    \b
      zimg-export compile BUNDLE --size 1024x1024 --size 832x1216
      zimg-export compile BUNDLE --min-size 512x512 --max-size 1536x1536
    """  # noqa: D301
    _need("compiling", ("onnx", "filelock"), "tensorrt")
    from zimgkit.export.compilers.compile import compile_bundle
    from zimgkit.runtime.progress import bar

    settings = compile_cli.settings(**compilation)
    with bar(enabled=not quiet) as report:
        compiled = compile_bundle(bundle, backend=backend, **settings, report=report)
    result = compile_cli.as_data(bundle, compiled, detailed=detailed)
    console.print_json(result) if as_json else click.echo(compile_cli.as_text(result))


@cli.command("swap-lora")
@BUNDLE
@LORA
@click.option("--out", type=click.Path(path_type=Path), help="A new bundle, which shares all other files.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is at --out.")
@KEEP_BASE
@click.option("--model", help="The checkpoint it was built from, where that has moved.")
@REVISION
@SOURCE
@ALLOW_UNMATCHED
@STEPS
@GUIDANCE
@QUIET
@AS_JSON
def swap_lora(bundle: Path, quiet: bool, as_json: bool, **options: Any) -> None:
    """Give a bundle another set of LoRAs, or none; nothing is traced, and only what they touch is written.

    \b
      zimg-export swap-lora BUNDLE --lora style.safetensors:0.8
      zimg-export swap-lora BUNDLE                                  # without LoRAs again
    """  # noqa: D301
    _need("swapping LoRAs", ("onnx", "filelock"), "export")
    from zimgkit.export.lora.swap import swap
    from zimgkit.runtime.progress import bar

    if options["out"] is None and demo_models.is_carried(bundle):
        raise UsageError(f"{bundle.name} comes with zimgkit and stays as it is", "write a new bundle with --out")
    with bar(enabled=not quiet) as report:
        swapped = swap(bundle, report=report, **options)
    root, stale = swapped.bundle.root, list(dict.fromkeys(engine.component for engine in swapped.stale))
    if stale:
        backends = dict.fromkeys("" if e.backend == COMPILED[0] else f" --backend {e.backend}" for e in swapped.stale)
        again = " and ".join(f"zimg-export compile {root}{backend}" for backend in backends)
        console.warn(f"the engines of {', '.join(stale)} were compiled from other weights; {again} compiles them again")
    if swapped.outgrown:
        console.warn(_outgrown(swapped))
    result = {
        "path": str(root),
        "loras": [{"source": lora.source, "scale": lora.scale} for lora in swapped.bundle.manifest.loras],
        "written_bytes": swapped.written,
        "stale_engines": stale,
        "refitted_engines": list(swapped.refitted),
        "outgrown": [{"tensor": name, "times": round(times, 3)} for name, times in swapped.outgrown.items()],
        "ignored": list(swapped.ignored),
    }
    if as_json:
        console.print_json(result)
        return
    names = ", ".join(f"{lora.file} at {lora.scale:g}" for lora in swapped.bundle.manifest.loras)
    click.echo(f"{root} has {names or 'no LoRA'} now; {swapped.written / 1e6:,.1f} MB of weights were written")
    if swapped.refitted:
        click.echo(f"the engines of {', '.join(swapped.refitted)} take them whenever they are loaded")


def _outgrown(swapped: Swapped) -> str:
    """What the user should know of weights that LoRAs made larger than their quantization allows for."""
    worst, times = next(iter(swapped.outgrown.items()))
    others = f" and {len(swapped.outgrown) - 1} more" if len(swapped.outgrown) > 1 else ""
    quantization = swapped.bundle.manifest.quantization
    cost = "they are rounded as much more coarsely; try a smaller scale"
    if quantization and quantization.inputs:
        cost = "inputs were calibrated without that; try a smaller scale, or build with --lora, which calibrates anew"
    return f"rows of {worst}{others} are up to {times:.1f} times as large as without these LoRAs: {cost}"


@cli.command()
@click.argument("model")
@REVISION
@SOURCE
@AS_JSON
def inspect(model: str, revision: str | None, source: str, as_json: bool) -> None:
    """Show what a checkpoint is and what it would become, without fetching weights; or what a LoRA is."""
    from zimgkit.export.lora import inspect as of_lora

    if of_lora.is_lora(model):
        found = of_lora.summary(model, source)
        console.print_json(found) if as_json else click.echo(of_lora.as_text(found))
        return
    _need_export()
    from zimgkit.export import inspect as work

    summary = work.summary(model, revision=revision, source=source)
    console.print_json(summary) if as_json else click.echo(work.as_text(summary))


@cli.command()
@BUNDLE
@click.option("--model", required=True, help="The checkpoint it was built from.")
@REVISION
@SOURCE
@click.option("--seed", type=int, default=0, show_default=True, help="Of the inputs the networks are compared on.")
@quantization_cli.verify_options
@QUIET
@AS_JSON
def verify(
    bundle: Path,
    model: str,
    revision: str | None,
    source: str,
    seed: int,
    strict: bool,
    quiet: bool,
    as_json: bool,
    **cost: Any,
) -> None:
    """Check a bundle against its checkpoint: every hash, every weight, every network's result.

    What the precision of a quantized bundle costs is measured as well, and written into it: its pictures, and each
    step's velocity, against float32 and beside what bfloat16 costs.
    """
    _need_export()
    from zimgkit.export.quality import verify as work
    from zimgkit.runtime.progress import bar

    measuring = quantization_cli.measuring(bundle, **cost)
    with bar(enabled=not quiet) as report:
        result = work.verify(
            bundle, model, revision=revision, source=source, seed=seed, measuring=measuring, report=report
        )
    console.print_json(result) if as_json else click.echo(work.as_text(result))
    work.refuse_failures(result, strict=strict)
    if result.get("past_bound"):
        console.warn(f"{result['past_bound']}; {work.KEEP_MORE}")


@cli.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--model", help="A checkpoint, in place of a bundle; one in bf16 is built for it.")
@click.option("--precision", type=click.Choice(quantization_cli.QUANTIZED), required=True, help="What to quantize to.")
@quantization_cli.sensitivity_options
@REVISION
@SOURCE
@QUIET
@AS_JSON
def sensitivity(
    bundle: Path | None,
    model: str | None,
    precision: str,
    out: Path | None,
    revision: str | None,
    source: str,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what each linear of a float bundle costs when it alone is quantized, and propose a recipe.

    \b
      zimg-export sensitivity BUNDLE --precision int8 --target 0.999 --out recipe.toml
      zimg-export build ... --precision int8 --recipe recipe.toml
    """  # noqa: D301
    _need_export()
    from zimgkit.engines.bundle import Bundle
    from zimgkit.export.quality import sensitivity as work
    from zimgkit.export.quality.references import temporary_bundle
    from zimgkit.runtime.progress import bar

    if (bundle is None) == (model is None):
        raise UsageError("sensitivity takes a bundle or --model", "name one of them")
    if out is not None and not out.absolute().parent.is_dir():
        raise OutputError(f"the folder {out.absolute().parent} does not exist", "make it first")
    with bar(enabled=not quiet) as report:
        if bundle is not None:
            opened = Bundle.open(bundle)
            found = quantization_cli.find_sensitivity(opened, precision, **options, report=report)
        else:
            with temporary_bundle(model or "", revision, source, report) as opened:
                found = quantization_cli.find_sensitivity(opened, precision, **options, report=report)
    if out is not None:
        work.save(found, out)
    console.print_json(work.as_data(found)) if as_json else click.echo(work.as_text(found))


@cli.command("demo-checkpoint")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--family", type=click.Choice(list(FAMILIES)), required=True, help="Which architecture.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random weights.")
@click.option("--overwrite", is_flag=True, help="Replace a demo checkpoint that is there.")
def demo_checkpoint(folder: Path, family: str, seed: int, overwrite: bool) -> None:
    """Write a tiny checkpoint with random weights into FOLDER, in the diffusers layout."""
    _need_export()
    from zimgkit.export.demo import write_demo_checkpoint

    write_demo_checkpoint(folder, family, seed=seed, overwrite=overwrite)
    click.echo(folder)


def _need_export() -> None:
    """Say what to install, rather than which module is missing."""
    _need("exporting", ("torch", "transformers", "onnxscript", "onnx_ir", "filelock"), "export")


def _need(what: str, modules: Sequence[str], extra: str) -> None:
    from importlib.util import find_spec

    if missing := [name for name in modules if not find_spec(name)]:
        raise ZimgError(f"{what} needs {', '.join(missing)}", f"pip install 'zimgkit[{extra}]'")


def main() -> None:
    """The console script."""
    console.run(cli)
