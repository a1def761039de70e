"""Options that several commands of ``zimg-export`` share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from zimgkit.engines.errors import UsageError
from zimgkit.runtime import demo_models
from zimgkit.runtime.commands.options import BundleFolder

Command = TypeVar("Command", bound=Callable[..., Any])
Option = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What ``click.option`` gives: it adds an option to a command's function."""

FILE = click.Path(path_type=Path)
COMPILED_BACKENDS = ("tensorrt", "tensorrt-rtx")
"""Backends that engines are compiled for."""
CALIBRATED = ("fp8", "int8")
"""Precisions that quantize the inputs of linears too, with scales from a calibration."""
QUANTIZED = (*CALIBRATED, "int8-dynamic", "int8-weights", "int4-weights")
"""All precisions that quantize."""

BUNDLE_FOLDER = BundleFolder()
BUNDLE = click.argument("bundle", type=BUNDLE_FOLDER)
SOURCE = click.option(
    "--source",
    type=click.Choice(["huggingface", "modelscope"]),
    default="huggingface",
    show_default=True,
    help="The hub to fetch from.",
)
PART = click.Path(path_type=Path, exists=True, dir_okay=False)
BASE = click.option(
    "--base", help="The checkpoint with all that a weight file does not hold. [default: told by its tensors]"
)
PARTS = (
    click.option("--transformer", type=PART, help="A weight file in the place of the checkpoint's transformer."),
    click.option("--text-encoder", type=PART, help="A weight file in the place of its text encoder."),
    click.option("--vae", type=PART, help="A weight file in the place of its VAE."),
)
"""Weight files of components."""
REVISION = click.option("--revision", help="The branch, tag or commit on the hub.")
LORA = click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="LORA[:SCALE]",
    help="A LoRA to merge: a file, a folder, a file on a hub (owner/name/file.safetensors) or its URL. Repeatable.",
)
POSITIVE_LORA = click.option(
    "--positive-only-lora",
    "positive_only_loras",
    multiple=True,
    metavar="LORA[:SCALE]",
    help="A LoRA to merge for the prompt alone: what the negative prompt gives is without it. Repeatable.",
)
KEEP_BASE = click.option(
    "--keep-base", is_flag=True, help="Keep the base weights too, so that the next swap needs no checkpoint."
)
ALLOW_UNMATCHED = click.option(
    "--allow-unmatched", is_flag=True, help="Skip modules of a LoRA that the model does not have."
)
STEPS = click.option(
    "--num-inference-steps", type=int, help="The steps to recommend. [default: the checkpoint's or the LoRA's]"
)
GUIDANCE = click.option(
    "--guidance-scale",
    type=float,
    help="The guidance scale to recommend, as diffusers counts it. [default: the checkpoint's or the LoRA's]",
)


class Names(click.ParamType[tuple[str, ...]]):
    """Names, separated by commas."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Each of them once, in the order given."""
        return tuple(dict.fromkeys(filter(None, (name.strip() for name in value.split(","))))) if value else ()


TASKS = click.option(
    "--tasks",
    type=Names(),
    default="",
    metavar="TASK,…",
    help="What to ask of it beside pictures from text: image-to-image, inpaint. [default: what the checkpoint is for]",
)

CONTROLNETS = click.option(
    "--controlnet",
    "controlnets",
    multiple=True,
    metavar="[NAME=]NET",
    help="A ControlNet to add: a file, a folder, a hub id, a file on a hub (owner/name/file.safetensors) or its URL, "
    "and what calls shall name it. Repeatable.",
)


def add_options(options: Iterable[Option], command: Command) -> Command:
    """Add options to a command's function, in the order in which ``--help`` lists them."""
    for option in reversed([*options]):
        command = option(command)  # type: ignore[assignment]
    return command


def parts_options(command: Command) -> Command:
    """Add ``--base`` and the options that name weight files of components."""
    return add_options((BASE, *PARTS), command)


def chosen_parts(
    model: str, base: str | None, transformer: Path | None, text_encoder: Path | None, vae: Path | None
) -> tuple[str, dict[str, Path]]:
    """What these options name: the checkpoint, and component -> its weight file. A base that was guessed is printed.

    Raises:
        CheckpointError: a file holds something else.
        UsageError: a base of a folder.
    """
    from zimgkit.export.checkpoints.checkpoint import with_base

    given = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    root, files = with_base(model, base, {name: path for name, path in given.items() if path is not None})
    if root not in (model, base):
        held = ", ".join(name for name, path in files.items() if path.name == Path(model).name)
        click.echo(f"{model} holds the {held}; the rest comes from {root} (--base names another)", err=True)
    return root, files


def refuse_carried(bundle: Path, instead: str) -> None:
    """Refuse to write into a bundle that comes with zimgkit.

    Raises:
        UsageError: it is one; the hint is what to do instead.
    """
    if demo_models.is_carried(bundle):
        raise UsageError(f"{bundle.name} comes with zimgkit and stays as it is", instead)
