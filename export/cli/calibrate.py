"""``zimg-export calibrate``: collect calibration statistics of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zimgkit.export.cli.extras import need_export
from zimgkit.export.cli.headings import ExportCommand
from zimgkit.export.cli.options import BUNDLE
from zimgkit.export.cli.quantization_options import calibrate_options, calibration_set
from zimgkit.runtime.commands.options import QUIET


@click.command("calibrate", cls=ExportCommand)
@BUNDLE
@calibrate_options
@QUIET
def calibrate_command(bundle: Path, quiet: bool, calibration_device: str | None, **options: Any) -> None:
    """Collect statistics of the inputs of all linears of a bundle that is not quantized.

    They are written to BUNDLE.calibration.safetensors, for build --calibration in fp8 and int8; those of a bundle that
    comes with zimgkit into the current folder. A calibration that was interrupted continues with the prompts that are
    left.
    """
    need_export()
    from zimgkit.engines.bundle import Bundle
    from zimgkit.export.quantization.calibrate import calibrate, statistics_path
    from zimgkit.runtime.progress import bar

    prompts = calibration_set(**options)
    opened = Bundle.open(bundle)
    store = statistics_path(opened.root)
    with bar(enabled=not quiet) as report:
        calibrate(opened, prompts, store, device=calibration_device, report=report)
    click.echo(store)
