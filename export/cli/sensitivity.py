"""``zimg-export sensitivity``: measure what quantizing each linear costs, and propose a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zimgkit.engines.errors import OutputError, UsageError
from zimgkit.export.cli import cost_options
from zimgkit.export.cli.extras import need_export
from zimgkit.export.cli.headings import ExportCommand
from zimgkit.export.cli.options import BUNDLE_FOLDER, CALIBRATED, FILE, QUANTIZED, REVISION, SOURCE
from zimgkit.runtime.commands import console
from zimgkit.runtime.commands.options import AS_JSON, DEVICE, QUIET

if TYPE_CHECKING:
    from zimgkit.engines.bundle import Bundle
    from zimgkit.export.quality.sensitivity import Sensitivity
    from zimgkit.runtime.progress import Report


@click.command("sensitivity", cls=ExportCommand)
@click.argument("bundle", required=False, type=BUNDLE_FOLDER)
@click.option("--model", help="A checkpoint, in place of a bundle; one in bf16 is built for the measurement.")
@click.option("--precision", type=click.Choice(QUANTIZED), required=True, help="The precision to quantize to.")
@click.option("--target", type=float, help="The cosine to reach. [default: the bound of the family's recipe]")
@click.option("-o", "--out", type=FILE, help="Write the recipe to this file.")
@click.option(
    "--by",
    type=click.Choice(["linear", "kind", "block"]),
    default="linear",
    show_default=True,
    help="Quantize linears one by one, those of one name together, or those of one block.",
)
@cost_options.PROMPTS
@cost_options.SIZE
@cost_options.IMAGES
@click.option(
    "--steps", "cost_steps", type=click.IntRange(1), default=4, show_default=True, help="The steps of each picture."
)
@click.option("--calibration", type=FILE, help="The statistics of a calibration. [default: those beside the bundle]")
@DEVICE
@REVISION
@SOURCE
@QUIET
@AS_JSON
def sensitivity_command(
    bundle: Path | None,
    model: str | None,
    out: Path | None,
    revision: str | None,
    source: str,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what each linear of a float bundle costs when it alone is quantized, and propose a recipe.

    \b
      zimg-export sensitivity BUNDLE --precision int8 --target 0.999 --out recipe.toml
      zimg-export build ... --precision int8 --recipe recipe.toml
    """  # noqa: D301
    need_export()
    from zimgkit.engines.bundle import Bundle
    from zimgkit.export.quality.references import temporary_bundle
    from zimgkit.export.quality.sensitivity import save_recipe, sensitivity_data, sensitivity_text
    from zimgkit.runtime.progress import bar

    if (bundle is None) == (model is None):
        raise UsageError("sensitivity takes a bundle or --model", "name one of them")
    if out is not None and not out.absolute().parent.is_dir():
        raise OutputError(f"the folder {out.absolute().parent} does not exist", "make it first")
    with bar(enabled=not quiet) as report:
        if bundle is not None:
            found = _measure(Bundle.open(bundle), **options, report=report)
        else:
            with temporary_bundle(model or "", revision, source, report) as opened:
                found = _measure(opened, **options, report=report)
    if out is not None:
        save_recipe(found, out)
    console.print_json(sensitivity_data(found)) if as_json else click.echo(sensitivity_text(found))


def _measure(
    bundle: Bundle,
    *,
    precision: str,
    target: float | None,
    by: str,
    cost_prompts: Path | None,
    cost_size: str | None,
    cost_steps: int | None,
    cost_images: tuple[Path, ...],
    calibration: Path | None,
    device: str | None,
    report: Report,
) -> Sensitivity:
    """Measure the sensitivity, after a calibration where the precision needs one and there is none.

    Raises:
        ZimgError: whatever went wrong, in one line.
    """
    from zimgkit.export.quality.sensitivity import sensitivity
    from zimgkit.export.quantization.calibrate import CalibrationSet, calibrate, statistics_path
    from zimgkit.export.quantization.quantize import QuantizationSettings
    from zimgkit.export.quantization.recipe import Recipe, family_recipe
    from zimgkit.export.quantization.statistics import Statistics

    pictures, statistics = cost_options.trial(cost_prompts, cost_size, cost_steps, cost_images), None
    if calibration is not None and precision not in CALIBRATED:
        raise UsageError(f"--calibration is not for --precision {precision}", f"it is for {', '.join(CALIBRATED)}")
    if precision in CALIBRATED:
        store = calibration or statistics_path(bundle.root)
        if calibration is not None or store.exists():
            statistics = Statistics.load(store)
        else:
            sizes = ((pictures.width, pictures.height),) if pictures.width and pictures.height else ()
            prompts = CalibrationSet(sizes=sizes, steps=cost_steps, pictures=pictures.pictures)
            statistics = calibrate(bundle, prompts, store, device=device, report=report)
    if target is None:
        target = family_recipe(bundle.manifest.family, bundle.manifest.name).bounds[precision].cosine
    settings = QuantizationSettings(precision, Recipe(), statistics)
    return sensitivity(bundle, settings, pictures, target, by=by, device=device, report=report)
