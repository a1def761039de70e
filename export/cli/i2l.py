"""``zimg-export i2l``: make a LoRA of pictures."""

from __future__ import annotations

from pathlib import Path

import click

from zimgkit.engines.choice import AUTO
from zimgkit.export.cli.extras import need_export
from zimgkit.export.cli.headings import ExportCommand
from zimgkit.export.cli.options import FILE, REVISION, SOURCE
from zimgkit.runtime.commands import console
from zimgkit.runtime.commands.options import AS_JSON, DEVICE, MEMORY, QUIET


@click.command("i2l", cls=ExportCommand)
@click.argument("model")
@click.argument("pictures", nargs=-1, type=FILE)
@click.option("-o", "--out", required=True, type=FILE, help="The LoRA's file.")
@click.option("--i2l", "generator", metavar="FILE", help="What makes the LoRA. [default: the release for MODEL]")
@click.option("--siglip", metavar="FILE", help="The encoder SigLIP2. [default: SigLIP2-G384 of General-Image-Encoders]")
@click.option("--dinov3", metavar="FILE", help="The encoder DINOv3. [default: DINOv3-7B of General-Image-Encoders]")
@REVISION
@SOURCE
@click.option("--overwrite", is_flag=True, help="Replace a LoRA that is there.")
@click.option(
    "--backend",
    type=click.Choice([AUTO, "onnxruntime", "openvino", "torch"]),
    default=AUTO,
    show_default=True,
    help="What runs the networks; auto: the best one installed for this machine.",
)
@DEVICE
@MEMORY
@QUIET
@AS_JSON
def i2l_command(
    model: str,
    pictures: tuple[Path, ...],
    out: Path,
    generator: str | None,
    siglip: str | None,
    dinov3: str | None,
    revision: str | None,
    source: str,
    overwrite: bool,
    backend: str,
    device: str | None,
    memory: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make a LoRA of PICTURES, in their style, for MODEL: a bundle, or a checkpoint as build takes it.

    \b
      zimg-export i2l BUNDLE one.png two.png --out style.safetensors
      zimg-export swap-lora BUNDLE --lora style.safetensors
    """  # noqa: D301
    need_export()
    from zimgkit.export.i2l.make import made_data, make_lora
    from zimgkit.export.i2l.running import Place
    from zimgkit.runtime.progress import bar

    with bar(enabled=not quiet) as report:
        made = make_lora(
            model,
            pictures,
            out,
            generator=generator,
            siglip=siglip,
            dinov3=dinov3,
            revision=revision,
            source=source,
            overwrite=overwrite,
            place=Place(backend, device, memory),
            report=report,
        )
    if as_json:
        console.print_json(dict(made_data(made)))
        return
    of = "1 picture" if made.pictures == 1 else f"{made.pictures} pictures"
    click.echo(f"{made.path}  a LoRA of {of} for {made.base}: {made.modules} modules of rank {made.rank}")
