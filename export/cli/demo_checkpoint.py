"""``zimg-export demo-checkpoint``: write a tiny checkpoint with random weights."""

from __future__ import annotations

from pathlib import Path

import click

from zimgkit.export.cli.extras import need_export
from zimgkit.export.cli.headings import ExportCommand
from zimgkit.export.cli.options import FILE
from zimgkit.export.networks.registry import FAMILIES


@click.command("demo-checkpoint", cls=ExportCommand)
@click.argument("folder", type=FILE)
@click.option("--family", type=click.Choice(list(FAMILIES)), required=True, help="The architecture to write.")
@click.option("--seed", type=int, default=0, show_default=True, help="The seed of the random weights.")
@click.option("--overwrite", is_flag=True, help="Replace a demo checkpoint that is there.")
def demo_checkpoint_command(folder: Path, family: str, seed: int, overwrite: bool) -> None:
    """Write a tiny checkpoint with random weights into FOLDER, in the diffusers layout."""
    need_export()
    from zimgkit.export.demo import write_demo_checkpoint

    write_demo_checkpoint(folder, family, seed=seed, overwrite=overwrite)
    click.echo(folder)
