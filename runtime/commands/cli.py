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
from zimgkit.runtime.commands.control_options import control_options, with_controls
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
    SIZE,
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
    help=f"The bundle's folder, its owner/name@revision on a hub, or one of {', '.join(demo_models.ALL)}."
    f" [default: {demo_models.DEFAULT}; of a picture to edit {demo_models.EDITOR}]",
)
@call_options(defaults={"keep_unmasked": "keep"})
@ENTITIES
@control_options
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
    bundle: Path | None,
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
    call = with_controls(call | regions(entities))
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
@control_options
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

    A table that ends in .csv names what each prompt starts from, in columns called image, mask_image, control_image,
    eligen_entity_prompts and eligen_entity_masks; of several pictures a cell has a list in JSON.
    """
    from zimgkit.runtime.commands.sheet import draw_sheet, rows_of
    from zimgkit.runtime.progress import bar

    texts, inputs = rows_of(prompts) if prompts else ([], [])
    with bar(enabled=not quiet) as report:
        result = draw_sheet(
            texts,
            output,
            with_controls(call | regions(entities)),
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
@click.argument("name", type=click.Choice(["canny", "depth", "pose", "lineart", "softedge", "normal"]))
@click.argument("source", metavar="PICTURE", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--low", type=float, help="Canny's lower threshold. [default: 100]")
@click.option("--high", type=float, help="Canny's upper threshold. [default: 200]")
@click.option(
    "--onnx", metavar="FILE", type=click.Path(path_type=Path), help="What makes all but canny: a file of yours."
)
@click.option(
    "--layout",
    type=click.Choice(["nchw", "nhwc"]),
    help="Where its input has the channels. [default: as its shape says]",
)
@click.option("--size", type=SIZE, help="The size of its input. [default: its own, or the picture's]")
@click.option(
    "--scaling",
    type=click.Choice(["imagenet", "unit", "signed", "bytes"]),
    help="How pixels go in: normalized, 0 to 1, -1 to 1 or 0 to 255. [default: NAME's]",
)
@click.option(
    "--levels",
    type=click.Choice(["range", "unit", "signed", "bytes"]),
    help="What is black and white in what comes out: its extremes, or as above. [default: NAME's]",
)
@click.option("--invert", is_flag=True, help="Let black and white change places.")
@AS_JSON
def preprocess(
    name: str,
    source: Path,
    output: Path,
    low: float | None,
    high: float | None,
    onnx: Path | None,
    as_json: bool,
    **way: Any,
) -> None:
    """Make a control picture of PICTURE: its edges (canny), or what an ONNX file of yours makes of it.

    \b
      zimg-run preprocess canny photo.png edges.png
      zimg-run preprocess depth photo.png depth.png --onnx depth-anything.onnx
    """  # noqa: D301
    from zimgkit.runtime.commands.preprocess import preprocess as preprocess_picture
    from zimgkit.runtime.pictures.control_maps import Way

    result = preprocess_picture(name, source, output, low=low, high=high, onnx=onnx, way=Way(**way))
    if as_json:
        console.print_json(result)
    else:
        console.say(f"{result['path']}  {result['width']}x{result['height']}")


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


@cli.command()
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    default=[demo_models.DEFAULT],
    show_default=True,
    metavar="[NAME=]BUNDLE",
    help="A bundle, and what clients call it where that is not its folder's name. Repeatable.",
)
@click.option("--alias", "aliases", multiple=True, metavar="NAME=MODEL", help="Another name of a model. Repeatable.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="The port to listen on, or 0 for any free one.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="A text file with a key in each line; clients need one of them.",
)
@click.option("--no-auth", is_flag=True, help="Ask for no key although other machines can reach the address.")
@click.option(
    "--allow-origin", "origins", multiple=True, help="A page that may ask, such as https://a.com. Repeatable."
)
@click.option("--allow-host", "hosts", multiple=True, help="Another name that the server is called by. Repeatable.")
@click.option(
    "--allow-url-prefix",
    "url_prefixes",
    multiple=True,
    metavar="URL",
    help="Fetch pictures that clients send as addresses below this one. Repeatable. [default: none is fetched]",
)
@click.option(
    "--max-queue-seconds",
    type=click.FloatRange(0, 1e6),
    default=600.0,
    show_default=True,
    help="How much work may wait; more is refused with 429.",
)
@click.option(
    "--max-body-mb", type=click.IntRange(1, 4096), default=64, show_default=True, help="The size of a request."
)
@click.option(
    "--grace-seconds",
    type=click.FloatRange(1, 1e5),
    default=30.0,
    show_default=True,
    help="How long pictures may still take after SIGTERM.",
)
@click.option(
    "--warm-up/--no-warm-up", default=True, show_default=True, help="Draw a picture before the first request."
)
@click.option("--access-log/--no-access-log", default=True, show_default=True, help="Log each request as JSON.")
@BACKEND
@click.option(
    "--device",
    "devices",
    multiple=True,
    help="Where it runs, as with generate; repeated, each device draws. [default: the best one]",
)
@MEMORY
@VAE_TILES
@QUIET
def serve(
    bundles: tuple[str, ...],
    aliases: tuple[str, ...],
    origins: tuple[str, ...],
    hosts: tuple[str, ...],
    url_prefixes: tuple[str, ...],
    max_queue_seconds: float,
    max_body_mb: int,
    quiet: bool,
    **options: Any,
) -> None:
    """Serve pictures over HTTP: OpenAI's images API, the API of AUTOMATIC1111's web UI, and a page."""
    from zimgkit.runtime.commands.serve import serve as serve_bundles

    serve_bundles(
        bundles,
        aliases=aliases,
        allow_origins=origins,
        allow_hosts=hosts,
        allow_url_prefixes=url_prefixes,
        max_queue_seconds=max_queue_seconds,
        max_body_bytes=max_body_mb << 20,
        note=partial(console.note, quiet=quiet),
        **options,
    )


def main() -> None:
    """The console script."""
    console.run(cli)
