"""The options of ``zimg-export`` that quantize, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from zimg.engines.errors import UsageError

if TYPE_CHECKING:
    from zimg.export.build import Quantizing
    from zimg.export.calibrate import Plan

Command = TypeVar("Command", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)
CALIBRATED = ("fp8", "int8")
"""Precisions whose inputs are quantized too, with ranges that were measured."""
QUANTIZED = (*CALIBRATED, "int8-weights", "int4-weights")

_PLAN = (
    click.option("--calibration-size", multiple=True, metavar="WxH", help="Of the pictures; may be repeated."),
    click.option("--calibration-steps", type=click.IntRange(1), help="Of each picture."),
    click.option("--calibration-device", help="Such as cpu or cuda:1."),
)
_BUILD = (
    click.option("--recipe", type=FILE, help="Which linears stay as they are (TOML); by default the family's own."),
    click.option(
        "--calibration", type=FILE, help="Prompts, one a line, or the .calibration.safetensors of an earlier run."
    ),
    click.option("--from-bundle", type=FILE, help="A float bundle to calibrate on; by default one is built for it."),
    *_PLAN,
    click.option(
        "--range", "range_", type=click.Choice(["max", "percentile", "mse"]), help="Of inputs.  [default: max]"
    ),
    click.option("--smooth", type=float, help="SmoothQuant's alpha, 0 for none.  [default: 0.5 in int8]"),
)


def options(command: Command) -> Command:
    """Those of ``build``."""
    return _with(_BUILD, command)


def plan_options(command: Command) -> Command:
    """Those of ``calibrate``."""
    prompts = click.option("--prompts", type=FILE, help="One a line; by default a dozen in English and Chinese.")
    return _with((prompts, *_PLAN), command)


def _with(found: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    for option in reversed(found):
        command = option(command)
    return command


def plan(
    prompts: Path | None,
    calibration_size: Sequence[str],
    calibration_steps: int | None,
    calibration_device: str | None,
) -> tuple[Plan, str | None]:
    """What a calibration runs, and on which device.

    Raises:
        UsageError: the prompts cannot be read or are too few, or a size is none.
    """
    from zimg.export.calibrate import Plan, default_prompts, read_prompts, sizes_from

    texts = default_prompts() if prompts is None else read_prompts(prompts)
    return Plan(texts, sizes_from(calibration_size), calibration_steps), calibration_device


def take(precision: str, given: dict[str, Any]) -> Quantizing:
    """Take the options of this file out of those of ``build``.

    Raises:
        UsageError: one is not for this precision, or names what cannot be read.
    """
    names = [str(parameter.name) for parameter in click.get_current_context().command.params]
    mine = {name: given.pop(name) for name in names if name in _NAMES and name in given}
    used = {name for name, value in mine.items() if value not in (None, ())}
    allowed = {"recipe"} if precision in QUANTIZED else set()
    if precision in CALIBRATED:
        allowed = set(_NAMES)
    if wrong := sorted(used - allowed):
        option = f"--{wrong[0].rstrip('_').replace('_', '-')}"
        fitting = CALIBRATED if precision in QUANTIZED or wrong[0] != "recipe" else QUANTIZED
        raise UsageError(f"{option} is not for --precision {precision}", f"it is for {', '.join(fitting)}")
    from zimg.export.build import Quantizing
    from zimg.export.recipe import read_recipe
    from zimg.export.statistics import Statistics

    calibration: Path | None = mine["calibration"]
    recipe = read_recipe(mine["recipe"]) if mine["recipe"] else None
    device = None
    if calibration is not None and calibration.suffix == ".safetensors":
        if clash := sorted(used & {"from_bundle", "calibration_size", "calibration_steps", "calibration_device"}):
            option = clash[0].replace("_", "-")
            raise UsageError(f"--{option} is for a calibration from prompts", f"{calibration} holds one that was run")
        found: Statistics | Plan = Statistics.load(calibration)
    else:
        found, device = plan(
            calibration, mine["calibration_size"], mine["calibration_steps"], mine["calibration_device"]
        )
    return Quantizing(recipe, found, mine["from_bundle"], mine["range_"] or "max", mine["smooth"], device)


_NAMES = (
    "recipe",
    "calibration",
    "from_bundle",
    "calibration_size",
    "calibration_steps",
    "calibration_device",
    "range_",
    "smooth",
)
