"""``zimg-export export``: write a bundle as a checkpoint for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from zimgkit.export.cli.extras import need_export
from zimgkit.export.cli.headings import ExportCommand
from zimgkit.export.cli.options import BUNDLE, FILE
from zimgkit.runtime.commands import console
from zimgkit.runtime.commands.options import AS_JSON, QUIET


@click.command("export", cls=ExportCommand)
@BUNDLE
@click.option(
    "--format",
    "kind",
    type=click.Choice(["diffusers", "comfyui"]),
    default="diffusers",
    show_default=True,
    help="A folder for diffusers; or for ComfyUI one .safetensors file, or a folder with a file for each loader.",
)
@click.option("-o", "--out", required=True, type=FILE, help="The new folder or file.")
@click.option("--model", help="The checkpoint it was built from, for what the bundle has not. [default: where it was]")
@click.option("--overwrite", is_flag=True, help="Replace what was exported there before.")
@QUIET
@AS_JSON
def export_command(
    bundle: Path, kind: str, out: Path, model: str | None, overwrite: bool, quiet: bool, as_json: bool
) -> None:
    """Write a bundle as a checkpoint for other programs: its LoRAs merged, quantized weights in its float type."""
    need_export()
    from zimgkit.export.publishing.save import save
    from zimgkit.runtime.progress import bar

    with bar(enabled=not quiet) as report:
        saved = save(bundle, out, kind, model=model, overwrite=overwrite, report=report)
    if as_json:
        console.print_json({"path": str(saved.path), "files": saved.files, "notes": list(saved.notes)})
        return
    for note in saved.notes:
        console.note(note, quiet=quiet)
    console.say(f"{saved.path}  {sum(saved.files.values()) / 1e9:,.3f} GB of weights")
