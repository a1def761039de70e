"""Options of the command line that are parameters of a call, derived from their one list."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import click

from zimgkit.engines.base import BACKENDS
from zimgkit.runtime.parameters import PARAMETERS, RECOMMENDED, VAE_TILING

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

BACKEND = click.option(
    "--backend",
    type=click.Choice(list(BACKENDS)),
    default="onnxruntime",
    show_default=True,
    help="What runs the networks.",
)
DEVICE = click.option("--device", help="cpu, cuda or cuda:N. [default: the best one present]")
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
    help="Decode in tiles: where memory is short for the whole, always, or never.",
)
QUIET = click.option("--quiet", is_flag=True, help="No progress bar.")
SETTINGS = {"max_content_width": 110, "help_option_names": ["-h", "--help"]}
SHORT = {"prompt": "-p"}
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def call_options(leave_out: Collection[str] = (), defaults: Mapping[str, Any] = {}) -> Decorator:
    """Add an option for every parameter of a call that the command line has, named as the parameter is.

    Args:
        leave_out: names of parameters that this command does not take.
        defaults: of those that have one here; the others are None where they are not given.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for parameter in reversed(PARAMETERS):
            if not parameter.option or parameter.name in leave_out:
                continue
            default, text = defaults.get(parameter.name), parameter.help
            if default is None and parameter.name != "prompt":
                text += f" [default: {parameter.default or RECOMMENDED}]"
            command = click.option(
                *filter(None, [SHORT.get(parameter.name)]),
                f"--{parameter.option}",
                parameter.name,
                type=parameter.type,
                default=default,
                show_default=default is not None,
                help=text,
            )(command)
        return command

    return decorate
