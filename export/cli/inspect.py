"""``zimg-export inspect``: describe a checkpoint or a LoRA."""

from __future__ import annotations

from pathlib import Path

import click

from zimgkit.export.cli.extras import need_export
from zimgkit.export.cli.headings import ExportCommand
from zimgkit.export.cli.options import REVISION, SOURCE, chosen_parts, parts_options
from zimgkit.runtime.commands import console
from zimgkit.runtime.commands.options import AS_JSON


@click.command("inspect", cls=ExportCommand)
@click.argument("model")
@parts_options
@REVISION
@SOURCE
@AS_JSON
def inspect_command(
    model: str,
    base: str | None,
    transformer: Path | None,
    text_encoder: Path | None,
    vae: Path | None,
    revision: str | None,
    source: str,
    as_json: bool,
) -> None:
    """Show what a checkpoint is and which components it becomes, without fetching weights; or what a LoRA is.

    Weights that are on this machine are checked as a build checks them.
    """
    from zimgkit.export.lora import inspect as lora_inspect

    if lora_inspect.is_lora(model):
        found = lora_inspect.lora_summary(model, source)
        console.print_json(found) if as_json else click.echo(lora_inspect.lora_text(found))
        return
    need_export()
    from zimgkit.export.inspect import checkpoint_summary, checkpoint_text

    root, files = chosen_parts(model, base, transformer, text_encoder, vae)
    summary = checkpoint_summary(root, revision=revision, source=source, files=files)
    console.print_json(summary) if as_json else click.echo(checkpoint_text(summary))
