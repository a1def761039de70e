"""``zimg-export calibrate-cache``: choose a mask for block caching, and measure what it and the others cost."""

from __future__ import annotations

from pathlib import Path

import click

from zimgkit.export.cli import cost_options
from zimgkit.export.cli.extras import need_export
from zimgkit.export.cli.headings import ExportCommand
from zimgkit.export.cli.options import BUNDLE, refuse_carried
from zimgkit.runtime.commands import console
from zimgkit.runtime.commands.options import AS_JSON, DEVICE, QUIET


@click.command("calibrate-cache", cls=ExportCommand)
@BUNDLE
@click.option(
    "--num-inference-steps",
    "cost_steps",
    type=click.IntRange(1, 1000),
    help="The steps that the mask is for. [default: the checkpoint's]",
)
@click.option(
    "--target-speed",
    type=float,
    help="How many times as fast the steps shall be at least. [default: as 'balanced' makes them]",
)
@click.option(
    "--target-error", type=float, metavar="DB", help="The PSNR that pictures shall keep, in place of a speed."
)
@click.option("--name", default="calibrated", show_default=True, help="What --cache says for the mask.")
@click.option(
    "--cache-order",
    type=click.IntRange(0, 1),
    default=1,
    show_default=True,
    help="What steps take over: 0 what the last full one gave, 1 what the last two extrapolate to.",
)
@cost_options.PROMPTS
@cost_options.SIZE
@cost_options.IMAGES
@cost_options.JUDGE
@cost_options.BACKEND
@DEVICE
@QUIET
@AS_JSON
def calibrate_cache_command(
    bundle: Path,
    cost_steps: int | None,
    target_speed: float | None,
    target_error: float | None,
    name: str,
    cache_order: int,
    cost_prompts: Path | None,
    cost_size: str | None,
    cost_images: tuple[Path, ...],
    judge: int | None,
    backend: str,
    device: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Choose which steps of a bundle to compute in full, where the others take over most of a step before.

    Some pictures are drawn, and each step is tried with what earlier steps gave. Of all masks that make the steps as
    fast, the one is taken whose errors add up to the least; or the sparsest whose pictures keep --target-error. It is
    written into the bundle for --cache, with what it costs and saves, and so are 'balanced' and 'fast'.
    """
    need_export()
    import msgspec

    from zimgkit.export.quality.caches import Aim, calibrate_cache
    from zimgkit.runtime.commands.inspect import cache_lines
    from zimgkit.runtime.progress import bar

    refuse_carried(bundle, "calibrate a copy of its folder")
    pictures = cost_options.trial(cost_prompts, cost_size, cost_steps, cost_images)
    with bar(enabled=not quiet) as report:
        masks = calibrate_cache(
            bundle,
            pictures,
            Aim(target_speed, target_error),
            name=name,
            order=cache_order,
            captions=judge,
            backend=backend,
            device=device,
            report=report,
        )
    if as_json:
        console.print_json({"path": str(bundle), "caches": msgspec.to_builtins(masks)})
    else:
        click.echo("\n".join(cache_lines(masks)))
