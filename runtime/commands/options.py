"""Options of the command line that are parameters of a call, derived from their one list."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zimgkit.engines.base import BACKENDS
from zimgkit.engines.choice import AUTO
from zimgkit.runtime import demo_models
from zimgkit.runtime.parameters import PARAMETERS, RECOMMENDED, VAE_TILING, Picture

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class BundleFolder(click.Path):
    """A bundle's folder, or the name of one that zimgkit carries; its value is the folder's path."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The folder, which need not be there, or where it lies on a hub: ``owner/name``, but not ``./owner/name``."""
        name = os.fsdecode(value)
        path = demo_models.locate(os.fsdecode(super().convert(value, param, ctx)))
        is_folder = name.startswith("./") or name.endswith("/")
        return path.absolute() if is_folder and not os.path.lexists(path) else path

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that fit and the bundles that lie in the folder; where there are none, all folders."""
        from click.shell_completion import CompletionItem

        names = (*demo_models.ALL, *sorted(path.parent.name for path in Path().glob("*/bundle.json")))
        fitting = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return fitting or [CompletionItem(incomplete, type="dir")]


class Size(click.ParamType[tuple[int, int]]):
    """A width and a height in pixels."""

    name = "WIDTHxHEIGHT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Both, of ``518x518``."""
        found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", str(value))
        if not found:
            self.fail(f"{value!r} is no size such as 518x518", param, ctx)
        return int(found[1]), int(found[2])


SIZE = Size()
BUNDLE = BundleFolder()
BACKEND = click.option(
    "--backend",
    type=click.Choice([AUTO, *BACKENDS]),
    default=AUTO,
    show_default=True,
    help="What runs the networks; auto: the best one installed for the bundle and this machine.",
)
DEVICE = click.option(
    "--device",
    help="The device to run on: cpu, cuda, cuda:N or cann; with openvino cpu, gpu or npu. [default: the best one]",
)
MEMORY = click.option(
    "--memory",
    default="auto",
    metavar="SIZE",
    show_default=True,
    help="How much memory to take: 8GB, 8GiB, 8192M, 50% of what is free, or auto for all of that.",
)
VAE_TILES = click.option(
    "--vae-tiling",
    type=click.Choice(VAE_TILING),
    default="auto",
    show_default=True,
    help="Encode and decode in tiles: where memory is short for the whole, always, or never.",
)
ENTITIES = click.option(
    "--entity",
    "entities",
    nargs=2,
    multiple=True,
    type=(str, click.Path(path_type=Path)),
    metavar="PROMPT MASK",
    help="What to draw in a region, and a picture that is white there. Repeatable.",
)
FROM_IMAGE = click.option(
    "--from-image", type=click.Path(path_type=Path), help="Take all parameters that are not given from this picture."
)
QUIET = click.option("--quiet", is_flag=True, help="Show no progress bar and no notes.")
SETTINGS = {"max_content_width": 110, "help_option_names": ["-h", "--help"]}
SHORT = {"prompt": "-p"}
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def _given(ctx: click.Context, param: click.Parameter, value: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What an option was given that may be repeated; None where it was not."""
    return value or None


def call_options(leave_out: Collection[str] = (), defaults: Mapping[str, str] = {}) -> Decorator:
    """Add an option for every parameter of a call that the command line has, named as the parameter is.

    Args:
        leave_out: names of parameters that this command does not take.
        defaults: what is used here where another than elsewhere is, in words; no option has a value if it is not given.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for parameter in reversed(PARAMETERS):
            if not parameter.option or parameter.name in leave_out:
                continue
            kind: Any = click.Path(path_type=Path) if parameter.type is Picture else parameter.type
            text, default = parameter.help, defaults.get(parameter.name, parameter.default or RECOMMENDED)
            if parameter.name != "prompt":
                text += f" [default: {default}]"
            command = click.option(
                *filter(None, [SHORT.get(parameter.name)]),
                f"--{parameter.option}",
                parameter.name,
                type=kind,
                default=None,
                is_flag=True if parameter.type is bool else None,
                multiple=parameter.several,
                callback=_given if parameter.several else None,
                help=text,
            )(command)
        return command

    return decorate


def regions(entities: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """What ``--entity`` was given, as parameters of a call."""
    if not entities:
        return {}
    prompts, masks = zip(*entities, strict=True)
    return {"eligen_entity_prompts": prompts, "eligen_entity_masks": masks}
