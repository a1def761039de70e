"""``zimg-export swap-lora``: replace the LoRAs of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zimgkit.export.cli.extras import need
from zimgkit.export.cli.headings import ExportCommand
from zimgkit.export.cli.options import (
    ALLOW_UNMATCHED,
    BUNDLE,
    COMPILED_BACKENDS,
    FILE,
    GUIDANCE,
    KEEP_BASE,
    LORA,
    POSITIVE_LORA,
    REVISION,
    SOURCE,
    STEPS,
    refuse_carried,
)
from zimgkit.runtime.commands import console
from zimgkit.runtime.commands.options import AS_JSON, QUIET

if TYPE_CHECKING:
    from zimgkit.export.lora.swap import Swapped


@click.command("swap-lora", cls=ExportCommand)
@BUNDLE
@LORA
@POSITIVE_LORA
@click.option("-o", "--out", type=FILE, help="Make a new bundle there, which shares all other files.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is at --out.")
@KEEP_BASE
@click.option("--model", help="The checkpoint that the bundle was built from, where that has moved.")
@REVISION
@SOURCE
@ALLOW_UNMATCHED
@STEPS
@GUIDANCE
@QUIET
@AS_JSON
def swap_lora_command(bundle: Path, quiet: bool, as_json: bool, **options: Any) -> None:
    """Replace the LoRAs of a bundle, or remove them; nothing is traced, and only the weights they change are written.

    \b
      zimg-export swap-lora BUNDLE --lora style.safetensors:0.8
      zimg-export swap-lora BUNDLE                                  # without LoRAs again
    """  # noqa: D301
    need("swapping LoRAs", ("onnx", "threadpoolctl"), "lora")
    from zimgkit.export.lora.swap import swap
    from zimgkit.runtime.progress import bar

    if options["out"] is None:
        refuse_carried(bundle, "write a new bundle with --out")
    with bar(enabled=not quiet) as report:
        swapped = swap(bundle, report=report, **options)
    root, stale = swapped.bundle.root, list(dict.fromkeys(engine.component for engine in swapped.stale))
    if stale:
        backends = dict.fromkeys(
            "" if engine.backend == COMPILED_BACKENDS[0] else f" --backend {engine.backend}" for engine in swapped.stale
        )
        again = " and ".join(f"zimg-export compile {root}{backend}" for backend in backends)
        console.warn(f"the engines of {', '.join(stale)} were compiled from other weights; {again} compiles them again")
    if swapped.outgrown:
        console.warn(_outgrown_text(swapped))
    result = _swapped_data(swapped, stale)
    if as_json:
        console.print_json(result)
        return
    manifest = swapped.bundle.manifest
    entries = [(lora, "") for lora in manifest.loras] + [(lora, " for the prompt") for lora in manifest.positive_loras]
    names = ", ".join(f"{lora.file} at {lora.scale:g}{branch}" for lora, branch in entries)
    click.echo(f"{root} has {names or 'no LoRA'} now; {swapped.written / 1e6:,.1f} MB of weights were written")
    if swapped.refitted:
        click.echo(f"the engines of {', '.join(swapped.refitted)} take them whenever they are loaded")


def _swapped_data(swapped: Swapped, stale: list[str]) -> dict[str, Any]:
    """What the swap did, as ``--json`` prints it."""
    manifest = swapped.bundle.manifest
    return {
        "path": str(swapped.bundle.root),
        "loras": [{"source": lora.source, "scale": lora.scale} for lora in manifest.loras],
        "positive_loras": [{"source": lora.source, "scale": lora.scale} for lora in manifest.positive_loras],
        "written_bytes": swapped.written,
        "stale_engines": stale,
        "refitted_engines": list(swapped.refitted),
        "outgrown": [{"tensor": name, "times": round(times, 3)} for name, times in swapped.outgrown.items()],
        "ignored": list(swapped.ignored),
    }


def _outgrown_text(swapped: Swapped) -> str:
    """The warning about weights that LoRAs made larger than the calibration of their inputs assumed."""
    worst, times = next(iter(swapped.outgrown.items()))
    others = f" and {len(swapped.outgrown) - 1} more" if len(swapped.outgrown) > 1 else ""
    quantization = swapped.bundle.manifest.quantization
    cost = "they are rounded as much more coarsely; try a smaller scale"
    if quantization and quantization.inputs:
        cost = "inputs were calibrated without that; try a smaller scale, or build with --lora, which calibrates anew"
    return f"rows of {worst}{others} are up to {times:.1f} times as large as without these LoRAs: {cost}"
