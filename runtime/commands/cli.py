"""``zimg-run``: pictures from a bundle. Thin; the work is in ``pipeline.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import zimgkit
from zimgkit.engines.base import BACKENDS
from zimgkit.runtime import demo_models
from zimgkit.runtime.commands import console

BACKEND_NAMES = click.Choice(list(BACKENDS))
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


@click.group("zimg-run", context_settings={"max_content_width": 110})
@click.version_option(zimgkit.__version__, message="%(version)s")
def cli() -> None:
    """Run a bundle: pictures from prompts, without PyTorch."""


@cli.command()
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    default=demo_models.DEFAULT,
    show_default=True,
    help=f"A bundle's folder, or one of zimgkit's own: {', '.join(demo_models.NAMES)}.",
)
@click.option("--prompt", help="What to draw.")
@click.option("--negative-prompt", help="What to guide away from. [default: the checkpoint's recommendation]")
@click.option("--height", type=int, help="In pixels, a multiple of 16. [default: the checkpoint's]")
@click.option("--width", type=int, help="In pixels, a multiple of 16. [default: the checkpoint's]")
@click.option("--num-inference-steps", type=int, help="Denoising steps. [default: the checkpoint's]")
@click.option(
    "--guidance-scale", type=float, help="As diffusers counts it for this family. [default: the checkpoint's]"
)
@click.option("--cfg-scale", type=float, help="As DiffSynth counts it, instead of --guidance-scale; 1 is off.")
@click.option("--seed", type=int, help="Of the noise. [default: a random one, which is printed]")
@click.option("--num-images", type=int, default=1, show_default=True, help="How many pictures.")
@click.option("--max-sequence-length", type=int, help="Prompt tokens that are read. [default: 512]")
@click.option("--from-image", type=click.Path(path_type=Path), help="Take all parameters not given from this picture.")
@click.option("--backend", type=BACKEND_NAMES, default="onnxruntime", show_default=True, help="What runs the networks.")
@click.option("--device", help="cpu, cuda or cuda:N. [default: the best one present]")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    show_default=True,
    help="PNG, JPEG or WebP by its ending; several pictures are numbered.",
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
@AS_JSON
def generate(
    bundle: Path,
    output: Path,
    from_image: Path | None,
    backend: str,
    device: str | None,
    quiet: bool,
    as_json: bool,
    **call: Any,
) -> None:
    """Generate pictures from a prompt."""
    from zimgkit.runtime.commands import generate as work
    from zimgkit.runtime.progress import bar

    with bar(enabled=not quiet) as report:
        result = work.generate(
            bundle,
            output,
            call,
            from_image=from_image,
            backend=backend,
            device=device,
            report=report,
            warn=console.warn,
        )
    if as_json:
        console.print_json(result)
    else:
        for picture in result["images"]:
            click.echo(f"{picture['path']}  seed {picture['seed']}")


@cli.command()
@click.argument("prompts", type=click.Path(path_type=Path))
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    type=click.Path(path_type=Path),
    default=[demo_models.DEFAULT],
    show_default=True,
    help="May be given several times: their pictures stand side by side.",
)
@click.option("--columns", type=int, default=4, show_default=True, help="Prompts side by side.")
@click.option("--negative-prompt", help="What to guide away from. [default: each checkpoint's recommendation]")
@click.option("--height", type=int, help="Of each picture, in pixels. [default: the checkpoint's]")
@click.option("--width", type=int, help="Of each picture, in pixels. [default: the checkpoint's]")
@click.option("--num-inference-steps", type=int, help="Denoising steps. [default: the checkpoint's]")
@click.option("--cfg-scale", type=float, help="Of guidance, as DiffSynth counts it. [default: the checkpoint's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the noise, the same for every picture.")
@click.option("--backend", type=BACKEND_NAMES, default="onnxruntime", show_default=True, help="What runs the networks.")
@click.option("--device", help="cpu, cuda or cuda:N. [default: the best one present]")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("sheet.png"), show_default=True, help="The page."
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
@AS_JSON
def sheet(
    prompts: Path,
    bundles: tuple[Path, ...],
    columns: int,
    output: Path,
    backend: str,
    device: str | None,
    quiet: bool,
    as_json: bool,
    **call: Any,
) -> None:
    """Draw every prompt of a text file, one a line, and save the pictures on one page."""
    from zimgkit.runtime.commands import sheet as work
    from zimgkit.runtime.progress import bar

    with bar(enabled=not quiet) as report:
        result = work.sheet(
            work.read_prompts(prompts),
            output,
            call,
            bundles=bundles,
            columns=columns,
            backend=backend,
            device=device,
            report=report,
            warn=console.warn,
        )
    if as_json:
        console.print_json(result)
    else:
        click.echo(result["path"])


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@AS_JSON
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what a bundle is and what is in it, after checking its files."""
    from zimgkit.runtime.commands import inspect as work

    summary = work.summary(bundle)
    if as_json:
        console.print_json(summary)
    else:
        click.echo(work.as_text(summary))


def main() -> None:
    """The console script."""
    console.run(cli)
