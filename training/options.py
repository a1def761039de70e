"""Options of the commands that train, by the names that DiffSynth-Studio's scripts have for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

FOLDER = click.Path(path_type=Path)
RANK = click.option("--rank", "--lora-rank", "rank", type=int, default=8, show_default=True, help="Of the adapters.")
TARGETS = click.option(
    "--targets",
    "--lora-target-modules",
    "targets",
    help="Ends of the names of linears, by commas; DiffSynth's own choice by default.",
)
PRECISION = click.option(
    "--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", help="Of the frozen weights."
)
RECOMPUTE = click.option(
    "--gradient-checkpointing",
    "--use-gradient-checkpointing",
    "gradient_checkpointing",
    is_flag=True,
    help="Slower, in less memory.",
)


def names_of(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Names by commas; None where there are none."""
    return None if value is None else tuple(filter(None, (name.strip() for name in value.split(","))))


def validation(command: Callable[..., None]) -> Callable[..., None]:
    """What becomes of what was trained."""
    for option in (
        click.option("--judge", type=click.IntRange(0), default=0, help="Held-out scenes of the world to draw then."),
        click.option("--validate/--no-validate", default=True, help="Build a bundle then, and draw a page with it."),
    ):
        command = option(command)
    return command


def columns(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say how a dataset is read, in the words of DiffSynth-Studio."""
    for option in (
        click.option("--num-epochs", type=click.IntRange(1), help="How often rows are seen, for --steps."),
        click.option("--dataset-repeat", type=click.IntRange(1), help="How often an epoch sees each row."),
        click.option("--max-pixels", type=click.IntRange(256), help="What larger pictures are reduced to."),
        click.option("--dataset-metadata-path", type=FOLDER, help="The table. [default: the folder's metadata.*]"),
        click.option("--extra-inputs", callback=names_of, help="Columns that the network takes, by commas."),
        click.option("--data-file-keys", callback=names_of, help="Columns that name pictures, by commas."),
    ):
        command = option(command)
    return command


class Underscores(click.Group):
    """Commands whose options may be written with underscores, as in DiffSynth-Studio."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As of a group, with dashes in the names of options."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command, [_dashed(word) for word in rest]


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if word.startswith("--") else word
