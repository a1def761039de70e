"""``zimg-export add-controlnet`` and ``remove-controlnet``: the ControlNets of a bundle that is built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from zimgkit.export.cli.extras import need_export
from zimgkit.export.cli.headings import ExportCommand
from zimgkit.export.cli.options import BUNDLE, REVISION, SOURCE, refuse_carried
from zimgkit.runtime.commands import console
from zimgkit.runtime.commands.options import AS_JSON, QUIET

if TYPE_CHECKING:
    from zimgkit.export.controls.change import Changed


@click.command("add-controlnet", cls=ExportCommand)
@BUNDLE
@click.argument("controlnets", nargs=-1, required=True, metavar="[NAME=]NET...")
@click.option("--model", help="The checkpoint that the bundle was built from, where that has moved.")
@REVISION
@SOURCE
@QUIET
@AS_JSON
def add_controlnet_command(
    bundle: Path,
    controlnets: tuple[str, ...],
    model: str | None,
    revision: str | None,
    source: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Put ControlNets into a bundle; no weight is copied where files can be linked.

    NET is a file, a folder, a hub id, a file on a hub (owner/name/file.safetensors) or its URL; calls say NAME.
    """
    need_export()
    from zimgkit.export.controls.change import add
    from zimgkit.runtime.progress import bar

    refuse_carried(bundle, "build a bundle of your own: zimg-export build")
    with bar(enabled=not quiet) as report:
        changed = add(bundle, controlnets, model=model, revision=revision, source=source, report=report)
    _tell(changed, as_json=as_json)


@click.command("remove-controlnet", cls=ExportCommand)
@BUNDLE
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@QUIET
@AS_JSON
def remove_controlnet_command(bundle: Path, names: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Take ControlNets out of a bundle."""
    need_export()
    from zimgkit.export.controls.change import remove
    from zimgkit.runtime.progress import bar

    refuse_carried(bundle, "it has none")
    with bar(enabled=not quiet) as report:
        changed = remove(bundle, names, report=report)
    _tell(changed, as_json=as_json)


def _tell(changed: Changed, *, as_json: bool) -> None:
    root, names = changed.bundle.root, [control.name for control in changed.bundle.manifest.controls]
    if changed.uncompiled:
        console.warn(f"{', '.join(changed.uncompiled)} has no engine yet: zimg-export compile {root}")
    if as_json:
        console.print_json({"path": str(root), "controls": names, "uncompiled": list(changed.uncompiled)})
        return
    click.echo(f"{root} has {', '.join(names) or 'no ControlNet'} now")
