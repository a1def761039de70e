"""The options of ``build`` that quantize, those of them that calibrate, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zimgkit.engines.errors import UsageError
from zimgkit.export.cli.cost_options import pictures_in, trial
from zimgkit.export.cli.options import BUNDLE_FOLDER, CALIBRATED, FILE, QUANTIZED, Command, add_options
from zimgkit.runtime.commands import console

if TYPE_CHECKING:
    from zimgkit.export.build import Quantizing
    from zimgkit.export.quality.verify import Measuring
    from zimgkit.export.quantization.calibrate import CalibrationSet
    from zimgkit.export.quantization.statistics import Statistics

_CALIBRATION = (
    click.option(
        "--calibration-size",
        multiple=True,
        metavar="WxH",
        help="A size of the calibration's pictures; may be repeated. [default: the checkpoint's]",
    ),
    click.option(
        "--calibration-steps",
        type=click.IntRange(1),
        help="The steps of each of its pictures. [default: the checkpoint's]",
    ),
    click.option(
        "--calibration-image",
        multiple=True,
        type=FILE,
        help="A picture to calibrate and measure a checkpoint on that edits; may be repeated.",
    ),
    click.option(
        "--calibration-device", help="The device to calibrate on: cpu, cuda or cuda:N. [default: the best one present]"
    ),
)
_BUILD = (
    click.option(
        "--recipe",
        type=FILE,
        help="A TOML file that says which linears stay unquantized. [default: the family's or model's own]",
    ),
    click.option(
        "--calibration",
        type=FILE,
        help="A file of prompts, one a line, or the .calibration.safetensors of an earlier run.",
    ),
    click.option(
        "--from-bundle",
        type=BUNDLE_FOLDER,
        help="The float bundle to calibrate on. [default: one that is built for it]",
    ),
    *_CALIBRATION,
    click.option(
        "--range",
        "range_",
        type=click.Choice(["max", "percentile", "mse"]),
        help="How the range of each input follows from its statistics. [default: max]",
    ),
    click.option("--smooth", type=float, help="The alpha of SmoothQuant; 0 is none. [default: 0.5 in int8]"),
    click.option(
        "--measure",
        is_flag=True,
        default=None,
        help="Measure what the precision costs, and warn past the recipe's bound.",
    ),
    click.option(
        "--strict", is_flag=True, default=None, help="Measure as --measure does, and build nothing past the bound."
    ),
    click.option(
        "--cost-prompts",
        type=FILE,
        help="A file with the prompts to measure on, one a line. [default: three of our own]",
    ),
    click.option(
        "--cost-size", metavar="WxH", help="The size of the pictures to measure on. [default: the checkpoint's]"
    ),
    click.option(
        "--cost-steps",
        type=click.IntRange(1),
        help="The steps of each picture to measure on. [default: the checkpoint's]",
    ),
)
_MEASURE_NAMES = ("measure", "strict", "cost_prompts", "cost_size", "cost_steps")
_CALIBRATION_RUN_NAMES = (
    *("from_bundle", "calibration_size", "calibration_steps", "calibration_image", "calibration_device"),
)
_NAMES = ("recipe", "calibration", *_CALIBRATION_RUN_NAMES, "range_", "smooth", *_MEASURE_NAMES)


def build_options(command: Command) -> Command:
    """Add the options of ``build`` that quantize."""
    return add_options(_BUILD, command)


def calibrate_options(command: Command) -> Command:
    """Add the options of ``calibrate``."""
    prompts = click.option(
        "--prompts", type=FILE, help="A file of prompts, one a line. [default: a dozen in English and Chinese]"
    )
    return add_options((prompts, *_CALIBRATION), command)


def calibration_set(
    prompts: Path | None,
    calibration_size: Sequence[str],
    calibration_steps: int | None,
    calibration_image: Sequence[Path] = (),
) -> CalibrationSet:
    """Make the calibration set that these options describe.

    Raises:
        UsageError: the prompts or a picture cannot be read, prompts are too few, or a size is not WIDTHxHEIGHT.
    """
    from zimgkit.export.compilers.shape_profiles import parse_size
    from zimgkit.export.quantization.calibrate import CalibrationSet, read_prompts

    texts = () if prompts is None else read_prompts(prompts)
    sizes = tuple(map(parse_size, calibration_size))
    return CalibrationSet(texts, sizes, calibration_steps, pictures_in(calibration_image))


def quantizing(precision: str, options: dict[str, Any]) -> Quantizing:
    """Take the options that quantize out of those of ``build``, and make the argument of the build from them.

    Args:
        precision: the value of ``--precision``.
        options: the options of ``build`` by name; those of this file are removed.

    Raises:
        UsageError: an option is not for this precision, or names a file that cannot be read.
    """
    own = {name: options.pop(name) for name in _NAMES}
    given = {name for name, value in own.items() if value not in (None, ())}
    _check_precision(precision, given)
    from zimgkit.export.build import Quantizing
    from zimgkit.export.quantization.recipe import read_recipe

    recipe = read_recipe(own["recipe"]) if own["recipe"] else None
    check = None
    if given & set(_MEASURE_NAMES):
        from zimgkit.export.quality.verify import Measuring

        pictures = trial(own["cost_prompts"], own["cost_size"], own["cost_steps"], own["calibration_image"])
        check = cost_check(Measuring(pictures), strict=bool(own["strict"]))
    return Quantizing(
        recipe,
        _calibration(own, given),
        own["from_bundle"],
        own["range_"] or "max",
        own["smooth"],
        own["calibration_device"],
        check,
    )


def _check_precision(precision: str, given: set[str]) -> None:
    """Refuse options that are not for a precision."""
    for_all = {"recipe", *_MEASURE_NAMES}
    for_all |= {"calibration_image"} if given & {"measure", "strict"} else set()
    allowed = set(_NAMES) if precision in CALIBRATED else for_all if precision in QUANTIZED else set()
    if precision == "keep":
        allowed = for_all - {"recipe"}
    if wrong := sorted(given - allowed):
        fitting = QUANTIZED if wrong[0] in for_all else CALIBRATED
        raise UsageError(f"{_flag(wrong[0])} is not for --precision {precision}", f"it is for {', '.join(fitting)}")


def _calibration(own: dict[str, Any], given: set[str]) -> CalibrationSet | Statistics:
    """The statistics that ``--calibration`` names, or the calibration set to collect them with."""
    path: Path | None = own["calibration"]
    if path is None or path.suffix != ".safetensors":
        return calibration_set(path, own["calibration_size"], own["calibration_steps"], own["calibration_image"])
    from zimgkit.export.quantization.statistics import Statistics

    measured = {"calibration_image"} if given & {"measure", "strict"} else set()
    if clash := sorted(given & set(_CALIBRATION_RUN_NAMES) - measured):
        raise UsageError(f"{_flag(clash[0])} is for a calibration from prompts", f"{path} holds one that was run")
    return Statistics.load(path)


def _flag(name: str) -> str:
    """The option as it is typed."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def cost_check(measuring: Measuring, *, strict: bool) -> Callable[..., None]:
    """Make the check of a bundle that is being built: its cost is measured, and held to the bound of its recipe.

    Args:
        measuring: how the cost is measured.
        strict: whether a cost past the bound fails the build; otherwise it warns.

    Returns:
        ``check(folder, checkpoint, merged, report)``, which raises a BundleError to fail the build.
    """

    def check(folder: Path, *arguments: Any) -> None:
        from zimgkit.engines.bundle import Bundle
        from zimgkit.engines.errors import BundleError
        from zimgkit.export.quality.cost import past_bound
        from zimgkit.export.quality.verify import LEAVE_MORE

        cost = measuring(folder, *arguments)
        if reason := past_bound(Bundle.open(folder, verify=False), cost):
            if strict:
                raise BundleError(reason, LEAVE_MORE)
            console.warn(f"{reason}; {LEAVE_MORE}")

    return check
