"""``zimg-run``: pictures from a bundle. The work is in the other files of this room."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

import zimgkit
from zimgkit.engines.errors import UsageError
from zimgkit.runtime import demo_models
from zimgkit.runtime.commands import console
from zimgkit.runtime.commands.options import AS_JSON, BACKEND, DEVICE, MEMORY, QUIET, SETTINGS, VAE_TILES, call_options


@click.group("zimg-run", context_settings=SETTINGS)
@click.version_option(zimgkit.__version__, "-V", "--version", message="%(version)s")
def cli() -> None:
    """Run a bundle: pictures from prompts, without PyTorch."""


@cli.command()
@click.argument("text", required=False)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    default=demo_models.DEFAULT,
    show_default=True,
    help=f"A bundle's folder, or one of zimgkit's own: {', '.join(demo_models.NAMES)}.",
)
@call_options()
@click.option("--from-image", type=click.Path(path_type=Path), help="Take all parameters not given from this picture.")
@BACKEND
@DEVICE
@MEMORY
@VAE_TILES
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    show_default=True,
    help="PNG, JPEG or WebP by its ending; several pictures are numbered.",
)
@QUIET
@AS_JSON
def generate(
    text: str | None,
    bundle: Path,
    output: Path,
    from_image: Path | None,
    backend: str,
    device: str | None,
    memory: str,
    vae_tiling: str,
    quiet: bool,
    as_json: bool,
    **call: Any,
) -> None:
    """Generate pictures from a prompt, which TEXT is, or --prompt."""
    from zimgkit.runtime.commands.generate import generate as generate_pictures
    from zimgkit.runtime.progress import bar

    if text is not None and call["prompt"] is not None:
        raise UsageError("the prompt is given twice", "leave --prompt out")
    call["prompt"] = text if call["prompt"] is None else call["prompt"]
    with bar(enabled=not quiet) as report:
        result = generate_pictures(
            bundle,
            output,
            call,
            from_image=from_image,
            backend=backend,
            device=device,
            memory=memory,
            vae_tiling=vae_tiling,
            report=report,
            warn=console.warn,
            say=partial(console.say, err=True) if not quiet else lambda message: None,
        )
    if as_json:
        console.print_json(result)
    else:
        for picture in result["images"]:
            console.say(f"{picture['path']}  seed {picture['seed']}")


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
@call_options(leave_out=("prompt", "num_images_per_prompt"), defaults={"seed": 0})
@BACKEND
@DEVICE
@MEMORY
@VAE_TILES
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("sheet.png"), show_default=True, help="The page."
)
@QUIET
@AS_JSON
def sheet(
    prompts: Path,
    bundles: tuple[Path, ...],
    columns: int,
    output: Path,
    backend: str,
    device: str | None,
    memory: str,
    vae_tiling: str,
    quiet: bool,
    as_json: bool,
    **call: Any,
) -> None:
    """Draw every prompt of a text file, one a line, and save the pictures on one page."""
    from zimgkit.runtime.commands.sheet import draw_sheet, prompts_of
    from zimgkit.runtime.progress import bar

    with bar(enabled=not quiet) as report:
        result = draw_sheet(
            prompts_of(prompts),
            output,
            call,
            bundles=bundles,
            columns=columns,
            backend=backend,
            device=device,
            memory=memory,
            vae_tiling=vae_tiling,
            report=report,
            warn=console.warn,
            say=partial(console.say, err=True) if not quiet else lambda message: None,
        )
    if as_json:
        console.print_json(result)
    else:
        console.say(result["path"])


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@AS_JSON
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what a bundle is and what is in it, after checking its files."""
    from zimgkit.runtime.commands.inspect import bundle_summary, bundle_text

    summary = bundle_summary(bundle)
    if as_json:
        console.print_json(summary)
    else:
        console.say(bundle_text(summary))


def main() -> None:
    """The console script."""
    console.run(cli)
