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
from zimgkit.runtime.commands.headings import RunCommand
from zimgkit.runtime.commands.options import (
    AS_JSON,
    BACKEND,
    BUNDLE,
    DEVICE,
    ENTITIES,
    FROM_IMAGE,
    MEMORY,
    QUIET,
    SETTINGS,
    VAE_TILES,
    call_options,
    regions,
)


@click.group("zimg-run", context_settings=SETTINGS)
@click.version_option(zimgkit.__version__, "-V", "--version", message="%(version)s")
def cli() -> None:
    """Run a bundle: pictures from prompts, without PyTorch."""


cli.command_class = RunCommand


@cli.command()
@click.argument("text", required=False)
@click.option(
    "--bundle",
    type=BUNDLE,
    default=demo_models.DEFAULT,
    show_default=True,
    help=f"The bundle's folder, its owner/name@revision on a hub, or one of {', '.join(demo_models.NAMES)}.",
)
@call_options(defaults={"keep_unmasked": "keep"})
@ENTITIES
@FROM_IMAGE
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
    help="The picture's file: PNG, JPEG or WebP by its ending; several are numbered.",
)
@QUIET
@AS_JSON
def generate(
    text: str | None,
    bundle: Path,
    output: Path,
    entities: tuple[tuple[str, Path], ...],
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
    call |= regions(entities)
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
            note=partial(console.note, quiet=quiet),
        )
    if as_json:
        console.print_json(result)
    else:
        for picture in result["images"]:
            console.say(f"{picture['path']}  seed {picture['seed']}")


@cli.command()
@click.argument("prompts", required=False, type=click.Path(path_type=Path))
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    type=BUNDLE,
    default=[demo_models.DEFAULT],
    show_default=True,
    help="A bundle; may be repeated: the pictures of all stand side by side.",
)
@click.option("--columns", type=int, default=4, show_default=True, help="How many prompts stand side by side.")
@call_options(leave_out=("prompt",), defaults={"seed": "0", "keep_unmasked": "keep"})
@ENTITIES
@FROM_IMAGE
@BACKEND
@DEVICE
@MEMORY
@VAE_TILES
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("sheet.png"),
    show_default=True,
    help="The page's file: PNG, JPEG or WebP by its ending.",
)
@QUIET
@AS_JSON
def sheet(
    prompts: Path | None,
    bundles: tuple[Path, ...],
    columns: int,
    output: Path,
    entities: tuple[tuple[str, Path], ...],
    from_image: Path | None,
    backend: str,
    device: str | None,
    memory: str,
    vae_tiling: str,
    quiet: bool,
    as_json: bool,
    **call: Any,
) -> None:
    """Draw every prompt of a text file, one a line, and save the pictures on one page.

    A table that ends in .csv, with columns prompt, image and mask_image, names a picture for each prompt to start from.
    """
    from zimgkit.runtime.commands.sheet import draw_sheet, rows_of
    from zimgkit.runtime.progress import bar

    texts, inputs = rows_of(prompts) if prompts else ([], [])
    with bar(enabled=not quiet) as report:
        result = draw_sheet(
            texts,
            output,
            call | regions(entities),
            bundles=bundles,
            inputs=inputs,
            from_image=from_image,
            columns=columns,
            backend=backend,
            device=device,
            memory=memory,
            vae_tiling=vae_tiling,
            report=report,
            warn=console.warn,
            note=partial(console.note, quiet=quiet),
        )
    if as_json:
        console.print_json(result)
    else:
        console.say("\n".join([result["path"], *(f"{name}: {text}" for name, text in result["numbered"].items())]))


@cli.command()
@click.argument("bundle", type=BUNDLE)
@click.option("--verify", is_flag=True, help="Read every byte again, and name each file that is not as it was built.")
@QUIET
@AS_JSON
@click.pass_context
def inspect(context: click.Context, bundle: Path, verify: bool, quiet: bool, as_json: bool) -> None:
    """Show what a bundle is and what is in it, after checking its files."""
    from zimgkit.runtime.commands.inspect import bundle_summary, bundle_text, verified_text, verify_bundle
    from zimgkit.runtime.progress import bar

    if verify:
        with bar(enabled=not quiet) as report:
            result = verify_bundle(bundle, report)
        console.print_json(result) if as_json else console.say(verified_text(result))
        context.exit(1 if result["errors"] else 0)

    summary = bundle_summary(bundle)
    if as_json:
        console.print_json(summary)
    else:
        console.say(bundle_text(summary))


@cli.command("list")
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@AS_JSON
def list_command(folders: tuple[Path, ...], as_json: bool) -> None:
    """List the bundles in FOLDERS and their children.

    By default: those that come with zimgkit, in the current folder, and in the caches of Hugging Face and ModelScope.
    """
    from zimgkit.runtime.commands.listing import list_bundles, list_text

    found = list_bundles(folders)
    if as_json:
        console.print_json(found)
    elif found:
        console.say(list_text(found))
    else:
        console.say("no bundles there; zimg-export build makes them", err=True)


def main() -> None:
    """The console script."""
    console.run(cli)
