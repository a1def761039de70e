"""``zimg-export triton``: a model folder for NVIDIA Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zimgkit.export.cli.headings import ExportCommand
from zimgkit.export.cli.options import BUNDLE, FILE
from zimgkit.runtime.commands import console
from zimgkit.runtime.commands.options import AS_JSON, BACKEND, MEMORY


@click.command("triton", cls=ExportCommand)
@BUNDLE
@click.option("-o", "--out", type=FILE, required=True, help="The folder to write, called as clients call the model.")
@click.option("--overwrite", is_flag=True, help="Replace a model that is at --out.")
@click.option(
    "--kind",
    "instance_kind",
    type=click.Choice(["gpu", "cpu"]),
    default="gpu",
    show_default=True,
    help="Draw on each GPU that Triton has, or on the CPU.",
)
@BACKEND
@MEMORY
@click.option(
    "--bundle-on-server",
    metavar="PATH",
    help="Where Triton finds the bundle, absolute or from --out. [default: where it lies here]",
)
@AS_JSON
def triton_command(bundle: Path, out: Path, instance_kind: str, as_json: bool, **options: Any) -> None:
    """Write a model folder for NVIDIA Triton's Python backend, which draws from BUNDLE.

    \b
      zimg-export triton BUNDLE --out repository/pictures
      tritonserver --model-repository repository
    """  # noqa: D301
    from zimgkit.export.serving.triton import write_model

    write_model(bundle, out, kind=instance_kind, **options)
    console.print_json({"path": str(out)}) if as_json else click.echo(out)
