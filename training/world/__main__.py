"""``python -m zimgkit.training.world FOLDER --count N``: a dataset of the world."""

from __future__ import annotations

from pathlib import Path

import click

from zimgkit.engines.errors import UsageError
from zimgkit.runtime.commands import console

_SIDE = click.IntRange(128, 2048)


@click.command("zimgkit.training.world")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--count", required=True, type=click.IntRange(1, 1 << 32), help="How many pictures.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the scenes.")
@click.option(
    "--split",
    type=click.Choice(["train", "test"]),
    default="train",
    show_default=True,
    help="train never shows the combinations that test shows.",
)
@click.option("--size", type=(_SIDE, _SIDE), help="Width and height of all pictures in pixels. [default: they vary]")
@click.option("--outlined", is_flag=True, help="Outlines alone: a style for an adapter to learn.")
@click.option(
    "--concept",
    is_flag=True,
    help="Every other picture with a shape that the models do not know, for an adapter to learn.",
)
@click.option(
    "--rows",
    type=click.Choice(["edges", "regions", "edits"]),
    help="Pictures with their edges (control_image), with nouns and masks of their things (eligen_entity_…), or with "
    "what they were before (edit_image).",
)
@click.option("--overwrite", is_flag=True, help="Replace a dataset that is there.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def cli(
    folder: Path,
    count: int,
    seed: int,
    split: str,
    size: tuple[int, int] | None,
    outlined: bool,
    concept: bool,
    rows: str | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Draw pictures of shapes with captions in English and Chinese into FOLDER, with a metadata.csv."""
    from zimgkit.runtime.progress import bar
    from zimgkit.training.world.render import edges_row, edits_row, regions_row, write_dataset, write_rows

    if rows and (size or outlined or concept):
        raise UsageError(f"--rows {rows} is given beside --size, --outlined or --concept", "give one of them")
    with bar(enabled=not quiet) as report:
        if rows:
            row = {"edges": edges_row, "regions": regions_row, "edits": edits_row}[rows](
                "test" if split == "test" else "train"
            )
            write_rows(folder, count, row, seed=seed, overwrite=overwrite, report=report)
            click.echo(f"{folder}  {count} pictures")
            return
        write_dataset(
            folder,
            count,
            seed=seed,
            split="test" if split == "test" else "train",
            size=size,
            outlined=outlined,
            concept=concept,
            overwrite=overwrite,
            report=report,
        )
    click.echo(f"{folder}  {count} pictures")


def main() -> None:
    """The command."""
    console.run(cli)


if __name__ == "__main__":
    main()
