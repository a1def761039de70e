"""``zimg-export push``: upload a bundle to a hub."""

from __future__ import annotations

import os
from pathlib import Path

import click

from zimgkit.export.cli.extras import need
from zimgkit.export.cli.headings import ExportCommand
from zimgkit.export.cli.options import BUNDLE
from zimgkit.runtime.commands import console
from zimgkit.runtime.commands.options import AS_JSON, QUIET


@click.command("push", cls=ExportCommand)
@BUNDLE
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--licence", help="The licence, as hubs call it. [default: what the checkpoint's card says]")
@click.option("--revision", help="The branch on the hub. [default: its main one]")
@QUIET
@AS_JSON
def push_command(
    bundle: Path, repository: str, private: bool, licence: str | None, revision: str | None, quiet: bool, as_json: bool
) -> None:
    """Upload a bundle to Hugging Face with a model card, whence zimg-run takes it: --bundle OWNER/NAME."""
    need("uploading", ("huggingface_hub",), "hub")
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from zimgkit.export.publishing.card import UNKNOWN
    from zimgkit.export.publishing.push import push

    url, stated = push(bundle, repository, private=private, licence=licence, revision=revision)
    if as_json:
        console.print_json({"url": url, "licence": stated})
        return
    if stated == UNKNOWN:
        console.note("the card says that the licence is unknown: name it with --licence", quiet=quiet)
    console.say(url)
