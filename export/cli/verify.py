"""``zimg-export verify``: check a bundle against its checkpoint, and measure what its precision costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zimgkit.export.cli import cost_options
from zimgkit.export.cli.extras import need_export
from zimgkit.export.cli.headings import ExportCommand
from zimgkit.export.cli.options import BUNDLE, BUNDLE_FOLDER, REVISION, SOURCE, refuse_carried
from zimgkit.runtime.commands import console
from zimgkit.runtime.commands.options import AS_JSON, DEVICE, QUIET

if TYPE_CHECKING:
    from zimgkit.export.quality.verify import Measuring


@click.command("verify", cls=ExportCommand)
@BUNDLE
@click.option("--model", required=True, help="The checkpoint that the bundle was built from.")
@REVISION
@SOURCE
@click.option(
    "--seed", type=int, default=0, show_default=True, help="The seed of the inputs that networks are compared on."
)
@click.option("--cost/--no-cost", default=None, help="Measure what the precision costs. [default: if quantized]")
@click.option("--strict", is_flag=True, help="Fail past the bound of the recipe that the bundle was built by.")
@cost_options.PROMPTS
@cost_options.SIZE
@cost_options.IMAGES
@click.option(
    "--steps", "cost_steps", type=click.IntRange(1), help="The steps of each picture. [default: the checkpoint's]"
)
@click.option(
    "--reference",
    "references",
    type=BUNDLE_FOLDER,
    multiple=True,
    help="A bundle of the same checkpoint in fp32 or bf16. [default: both are built for the measurement]",
)
@cost_options.JUDGE
@cost_options.BACKEND
@DEVICE
@QUIET
@AS_JSON
def verify_command(
    bundle: Path,
    model: str,
    revision: str | None,
    source: str,
    seed: int,
    strict: bool,
    quiet: bool,
    as_json: bool,
    **cost: Any,
) -> None:
    """Check a bundle against its checkpoint: every hash, every weight, every network's result.

    What the precision of a quantized bundle costs is measured as well, and written into it: the errors of its pictures
    and of each step's velocity against float32, beside those of bfloat16.
    """
    need_export()
    from zimgkit.export.quality.verify import LEAVE_MORE, refuse_failures, verification_text, verify
    from zimgkit.runtime.progress import bar

    measuring = _measuring(bundle, **cost)
    with bar(enabled=not quiet) as report:
        result = verify(bundle, model, revision=revision, source=source, seed=seed, measuring=measuring, report=report)
    console.print_json(result) if as_json else click.echo(verification_text(result))
    refuse_failures(result, strict=strict)
    if result.get("past_bound"):
        console.warn(f"{result['past_bound']}; {LEAVE_MORE}")


def _measuring(
    bundle: Path,
    cost: bool | None,
    cost_prompts: Path | None,
    cost_size: str | None,
    cost_steps: int | None,
    cost_images: tuple[Path, ...],
    references: tuple[Path, ...],
    judge: int | None,
    backend: str,
    device: str | None,
) -> Measuring | None:
    """How the bundle's cost is measured; None with ``--no-cost``, and by default of a bundle that is not quantized.

    Raises:
        UsageError: the prompts cannot be read, the size is not WIDTHxHEIGHT, or the bundle comes with zimgkit.
        BundleError: the folder is not a bundle.
    """
    from zimgkit.engines.bundle import Bundle
    from zimgkit.export.quality.verify import Measuring

    pictures = cost_options.trial(cost_prompts, cost_size, cost_steps, cost_images)
    wanted = Bundle.open(bundle, verify=False).manifest.quantization is not None if cost is None else cost
    if wanted:
        refuse_carried(bundle, "leave --cost out, or measure a copy of its folder")
    return Measuring(pictures, references, backend, device, judge) if wanted else None
