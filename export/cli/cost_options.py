"""Options that say on which pictures the cost of a precision or a cache is measured, and by what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zimgkit.engines.base import BACKENDS
from zimgkit.export.cli.options import FILE

if TYPE_CHECKING:
    from zimgkit.export.quality.runs import Trial

PROMPTS = click.option(
    "--prompts",
    "cost_prompts",
    type=FILE,
    help="A file with the prompts of the pictures, one a line. [default: three of our own]",
)
SIZE = click.option("--size", "cost_size", metavar="WxH", help="The size of the pictures. [default: the checkpoint's]")

IMAGES = click.option(
    "--calibration-image",
    "cost_images",
    multiple=True,
    type=FILE,
    help="A picture to edit, where the checkpoint edits; may be repeated.",
)

JUDGE = click.option(
    "--judge", type=click.IntRange(0), help="How many pictures to judge. [default: 200 of zimg-tiny-…]"
)
BACKEND = click.option(
    "--backend",
    type=click.Choice(list(BACKENDS)),
    default="onnxruntime",
    show_default=True,
    help="What runs the bundle.",
)


def trial(
    cost_prompts: Path | None, cost_size: str | None, cost_steps: int | None, cost_images: Sequence[Path] = ()
) -> Trial:
    """Make the trial that the options of a command describe.

    Raises:
        UsageError: the prompts or a picture cannot be read, or the size is not WIDTHxHEIGHT.
    """
    from zimgkit.export.compilers.shape_profiles import parse_size
    from zimgkit.export.quality.runs import Trial
    from zimgkit.export.quantization.calibrate import read_prompts

    prompts = () if cost_prompts is None else read_prompts(cost_prompts, fewest=1)
    width, height = parse_size(cost_size) if cost_size else (None, None)
    return Trial(prompts, width, height, cost_steps, pictures=pictures_in(cost_images))


def pictures_in(files: Sequence[Path]) -> tuple[str, ...]:
    """Check that pictures can be read, which is better missed now than after the build; their absolute paths.

    Raises:
        UsageError: one cannot.
    """
    from zimgkit.runtime.pictures.reading import read_picture

    for file in files:
        read_picture(file, "--calibration-image")
    return tuple(str(file.absolute()) for file in files)
