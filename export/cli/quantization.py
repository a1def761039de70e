"""The options of ``zimg-export`` that quantize, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from zimgkit.engines.base import BACKENDS
from zimgkit.engines.errors import UsageError
from zimgkit.runtime.commands import console

if TYPE_CHECKING:
    from zimgkit.engines.bundle import Bundle
    from zimgkit.export.build import Quantizing
    from zimgkit.export.quality.cost import Trial
    from zimgkit.export.quality.sensitivity import Sensitivity
    from zimgkit.export.quality.verify import Measuring
    from zimgkit.export.quantization.calibrate import CalibrationSet
    from zimgkit.runtime.progress import Report

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
    click.option(
        "--measure", is_flag=True, default=None, help="Measure what it costs, and warn past the recipe's bound."
    ),
    click.option("--strict", is_flag=True, default=None, help="As --measure, and build nothing past it."),
    click.option("--cost-prompts", type=FILE, help="For that: prompts, one a line; by default three."),
    click.option("--cost-size", metavar="WxH", help="For that: of the pictures.  [default: the checkpoint's]"),
    click.option("--cost-steps", type=click.IntRange(1), help="For that.  [default: the checkpoint's]"),
)
_VERIFY = (
    click.option("--cost/--no-cost", default=None, help="Measure what its precision costs.  [default: if quantized]"),
    click.option("--strict", is_flag=True, help="Fail past the bound of the recipe it was built by."),
    click.option("--prompts", "cost_prompts", type=FILE, help="Of the pictures, one a line; by default three."),
    click.option("--size", "cost_size", metavar="WxH", help="Of the pictures.  [default: the checkpoint's]"),
    click.option("--steps", "cost_steps", type=click.IntRange(1), help="Of each picture.  [default: the checkpoint's]"),
    click.option(
        "--reference",
        "references",
        type=FILE,
        multiple=True,
        help="A bundle of the same checkpoint in fp32 or bf16; by default both are built for it.",
    ),
    click.option("--judge", type=click.IntRange(0), help="How many pictures to judge.  [default: 200 of zimg-tiny-…]"),
    click.option(
        "--backend", type=click.Choice(list(BACKENDS)), default="onnxruntime", show_default=True, help="For the bundle."
    ),
    click.option("--device", help="Such as cpu or cuda:1."),
)


_SENSITIVITY = (
    click.option("--target", type=float, help="The cosine to reach.  [default: the bound of the family's recipe]"),
    click.option("--out", type=FILE, help="Write the recipe there."),
    click.option(
        "--by",
        type=click.Choice(["linear", "kind", "block"]),
        default="linear",
        show_default=True,
        help="Quantize linears one by one, those of one name together, or those of one block.",
    ),
    click.option("--prompts", "cost_prompts", type=FILE, help="Of the pictures, one a line; by default three."),
    click.option("--size", "cost_size", metavar="WxH", help="Of the pictures.  [default: the checkpoint's]"),
    click.option(
        "--steps", "cost_steps", type=click.IntRange(1), default=4, show_default=True, help="Of each picture."
    ),
    click.option(
        "--calibration", type=FILE, help="For fp8 and int8: statistics.  [default: those statistics_path the bundle]"
    ),
    click.option("--device", help="Such as cpu or cuda:1."),
)


def options(command: Command) -> Command:
    """Those of ``build``."""
    return _with(_BUILD, command)


def plan_options(command: Command) -> Command:
    """Those of ``calibrate``."""
    prompts = click.option("--prompts", type=FILE, help="One a line; by default a dozen in English and Chinese.")
    return _with((prompts, *_PLAN), command)


def sensitivity_options(command: Command) -> Command:
    """Those of ``sensitivity``."""
    return _with(_SENSITIVITY, command)


def find_sensitivity(
    bundle: Bundle,
    precision: str,
    *,
    target: float | None,
    by: str,
    cost_prompts: Path | None,
    cost_size: str | None,
    cost_steps: int | None,
    calibration: Path | None,
    device: str | None,
    report: Report,
) -> Sensitivity:
    """Do what ``sensitivity`` does, after a calibration where one is needed and not there.

    Raises:
        ZimgError: whatever went wrong, in one line.
    """
    from zimgkit.export.quality.sensitivity import sensitivity
    from zimgkit.export.quantization.calibrate import CalibrationSet, calibrate, statistics_path
    from zimgkit.export.quantization.quantize import QuantizationSettings
    from zimgkit.export.quantization.recipe import Recipe, family_recipe
    from zimgkit.export.quantization.statistics import Statistics

    pictures, statistics = trial(cost_prompts, cost_size, cost_steps), None
    if calibration is not None and precision not in CALIBRATED:
        raise UsageError(f"--calibration is not for --precision {precision}", f"it is for {', '.join(CALIBRATED)}")
    if calibration is None and statistics_path(bundle.root).exists():
        calibration = statistics_path(bundle.root)
    if calibration is not None and precision in CALIBRATED:
        statistics = Statistics.load(calibration)
    elif precision in CALIBRATED:
        sizes = ((pictures.width, pictures.height),) if pictures.width and pictures.height else ()
        plan = CalibrationSet(sizes=sizes, steps=cost_steps)
        statistics = calibrate(bundle, plan, statistics_path(bundle.root), device=device, report=report)
    if target is None:
        target = family_recipe(bundle.manifest.family, bundle.manifest.name).bounds[precision].cosine
    settings = QuantizationSettings(precision, Recipe(), statistics)
    return sensitivity(bundle, settings, pictures, target, by=by, device=device, report=report)


def verify_options(command: Command) -> Command:
    """Those of ``verify``."""
    return _with(_VERIFY, command)


def trial(cost_prompts: Path | None, cost_size: str | None, cost_steps: int | None) -> Trial:
    """The pictures that a cost is measured on.

    Raises:
        UsageError: the prompts cannot be read, or the size is none.
    """
    from zimgkit.export.compilers.shape_profiles import parse_size
    from zimgkit.export.quality.cost import Trial
    from zimgkit.export.quantization.calibrate import read_prompts

    prompts = () if cost_prompts is None else read_prompts(cost_prompts, fewest=1)
    width, height = parse_size(cost_size) if cost_size else (None, None)
    return Trial(prompts, width, height, cost_steps)


def measuring(
    bundle: Path,
    cost: bool | None,
    cost_prompts: Path | None,
    cost_size: str | None,
    cost_steps: int | None,
    references: tuple[Path, ...],
    judge: int | None,
    backend: str,
    device: str | None,
) -> Measuring | None:
    """How ``verify`` measures a bundle's cost; None where it shall not, or where nothing is quantized.

    Raises:
        UsageError: the prompts cannot be read, or the size is none.
        BundleError: it is no bundle.
    """
    from zimgkit.engines.bundle import Bundle
    from zimgkit.export.quality.verify import Measuring

    pictures = trial(cost_prompts, cost_size, cost_steps)
    wanted = Bundle.open(bundle, verify=False).manifest.quantization is not None if cost is None else cost
    return Measuring(pictures, references, backend, device, judge) if wanted else None


def gate(measuring: Measuring, *, strict: bool) -> Callable[..., None]:
    """What measures a bundle that is being built, and refuses it, or warns, where it costs more than it may."""

    def check(folder: Path, *of: Any) -> None:
        from zimgkit.engines.bundle import Bundle
        from zimgkit.engines.errors import BundleError
        from zimgkit.export.quality.cost import past_bound
        from zimgkit.export.quality.verify import KEEP_MORE

        cost = measuring(folder, *of)
        if said := past_bound(Bundle.open(folder, verify=False), cost):
            if strict:
                raise BundleError(said, KEEP_MORE)
            console.warn(f"{said}; {KEEP_MORE}")

    return check


def _with(found: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    for option in reversed(found):
        command = option(command)
    return command


def plan(
    prompts: Path | None,
    calibration_size: Sequence[str],
    calibration_steps: int | None,
    calibration_device: str | None,
) -> tuple[CalibrationSet, str | None]:
    """What a calibration runs, and on which device.

    Raises:
        UsageError: the prompts cannot be read or are too few, or a size is none.
    """
    from zimgkit.export.compilers.shape_profiles import parse_size
    from zimgkit.export.quantization.calibrate import CalibrationSet, read_prompts

    texts = () if prompts is None else read_prompts(prompts)
    return CalibrationSet(texts, tuple(map(parse_size, calibration_size)), calibration_steps), calibration_device


def take(precision: str, given: dict[str, Any]) -> Quantizing:
    """Take the options of this file out of those of ``build``.

    Raises:
        UsageError: one is not for this precision, or names what cannot be read.
    """
    names = [str(parameter.name) for parameter in click.get_current_context().command.params]
    mine = {name: given.pop(name) for name in names if name in _NAMES and name in given}
    used = {name for name, value in mine.items() if value not in (None, ())}
    allowed = {"recipe", *_MEASURE} if precision in QUANTIZED else set()
    if precision in CALIBRATED:
        allowed = set(_NAMES)
    if wrong := sorted(used - allowed):
        option = f"--{wrong[0].rstrip('_').replace('_', '-')}"
        fitting = QUANTIZED if wrong[0] in {"recipe", *_MEASURE} else CALIBRATED
        raise UsageError(f"{option} is not for --precision {precision}", f"it is for {', '.join(fitting)}")
    from zimgkit.export.build import Quantizing
    from zimgkit.export.quantization.recipe import read_recipe
    from zimgkit.export.quantization.statistics import Statistics

    calibration: Path | None = mine["calibration"]
    recipe = read_recipe(mine["recipe"]) if mine["recipe"] else None
    device = None
    if calibration is not None and calibration.suffix == ".safetensors":
        if clash := sorted(used & {"from_bundle", "calibration_size", "calibration_steps", "calibration_device"}):
            option = clash[0].replace("_", "-")
            raise UsageError(f"--{option} is for a calibration from prompts", f"{calibration} holds one that was run")
        found: Statistics | CalibrationSet = Statistics.load(calibration)
    else:
        found, device = plan(
            calibration, mine["calibration_size"], mine["calibration_steps"], mine["calibration_device"]
        )
    check = None
    if used & set(_MEASURE):
        from zimgkit.export.quality.verify import Measuring

        pictures = trial(mine["cost_prompts"], mine["cost_size"], mine["cost_steps"])
        check = gate(Measuring(pictures), strict=bool(mine["strict"]))
    return Quantizing(recipe, found, mine["from_bundle"], mine["range_"] or "max", mine["smooth"], device, check)


_MEASURE = ("measure", "strict", "cost_prompts", "cost_size", "cost_steps")
_NAMES = (
    "recipe",
    "calibration",
    "from_bundle",
    "calibration_size",
    "calibration_steps",
    "calibration_device",
    "range_",
    "smooth",
    *_MEASURE,
)
