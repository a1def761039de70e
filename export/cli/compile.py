"""``zimg-export compile``: compile engines for a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from zimgkit.export.cli import compile_options
from zimgkit.export.cli.extras import need
from zimgkit.export.cli.headings import ExportCommand
from zimgkit.export.cli.options import BUNDLE, COMPILED_BACKENDS, refuse_carried
from zimgkit.export.compilers.tensorrt import layers
from zimgkit.runtime.commands import console
from zimgkit.runtime.commands.inspect import range_text
from zimgkit.runtime.commands.options import AS_JSON, QUIET

if TYPE_CHECKING:
    from zimgkit.export.compilers.compile import CompiledComponent


@click.command("compile", cls=ExportCommand)
@BUNDLE
@click.option(
    "--backend",
    type=click.Choice(COMPILED_BACKENDS),
    default=COMPILED_BACKENDS[0],
    show_default=True,
    help="What will run the engines.",
)
@compile_options.compile_options
@QUIET
@AS_JSON
def compile_command(bundle: Path, backend: str, detailed: bool, quiet: bool, as_json: bool, **options: Any) -> None:
    """Compile engines for a bundle; those that are up to date stay.

    One size compiles to the fastest engine. Several sizes, or a range of sizes, share an engine and its weights:

    \b
      zimg-export compile BUNDLE --size 1024x1024 --size 832x1216
      zimg-export compile BUNDLE --min-size 512x512 --max-size 1536x1536
    """  # noqa: D301
    need("compiling", ("onnx",), backend)
    from zimgkit.export.compilers.compile import compile_bundle
    from zimgkit.runtime.progress import bar

    refuse_carried(bundle, f"compile one of your own: zimg-export build --model {bundle.name} --out FOLDER")
    arguments = compile_options.compile_arguments(**options)
    with bar(enabled=not quiet) as report:
        compiled = compile_bundle(bundle, backend=backend, **arguments, report=report)
    result = compiled_data(bundle, compiled, detailed=detailed)
    console.print_json(result) if as_json else click.echo(compiled_text(result))


def compiled_data(bundle: Path, compiled: Sequence[CompiledComponent], *, detailed: bool) -> dict[str, Any]:
    """Describe what was compiled, as ``--json`` prints it."""
    engines = []
    for entry in compiled:
        found = msgspec.to_builtins(entry.engine) | {"up_to_date": not entry.is_new}
        found["bytes"] = sum((bundle / name).stat().st_size for name in entry.engine.files)
        if entry.plan:
            found |= {
                "layer_kinds": layers.kinds(entry.plan.layers),
                "unfused_attention": list(entry.plan.unfused),
                "not_in_8_bits": list(entry.plan.not_in_8_bits),
                "warnings": list(entry.plan.warnings),
            }
            if detailed:
                found["layers"] = [vars(layer) for layer in entry.plan.layers]
        engines.append(found)
    return {"path": str(bundle), "engines": engines}


def compiled_text(data: dict[str, Any]) -> str:
    """Format the result of :func:`compiled_data` for people."""
    lines = []
    for engine in data["engines"]:
        fused, unfused = engine.get("attention", (0, 0))
        state = "up to date" if engine["up_to_date"] else f"{engine['bytes'] / 1e6:,.1f} MB"
        lines.append(f"{engine['component']}  {state}  {engine['file']}")
        for profile in engine["profiles"]:
            lines.append(
                "  serves     "
                + ", ".join(f"{dimension} {range_text(lengths)}" for dimension, lengths in profile.items())
            )
        if fused + unfused:
            lines.append(f"  attention  {fused} of {fused + unfused} in one fused kernel each")
        if engine.get("unfused_attention"):
            lines.append(f"  unfused    {', '.join(engine['unfused_attention'])}")
        in_8_bits, others = engine.get("products", (0, 0))
        if in_8_bits + others:
            lines.append(f"  products   {in_8_bits} of {in_8_bits + others} of quantized inputs in 8 bits")
        if engine.get("not_in_8_bits"):
            lines.append(f"  wider      {', '.join(engine['not_in_8_bits'])}")
        if engine.get("layer_kinds"):
            lines.append("  layers     " + ", ".join(f"{n} {kind}" for kind, n in engine["layer_kinds"].items()))
        lines += [f"    {layer['kind']:16} {layer['name']}" for layer in engine.get("layers", ())]
        lines += [f"  warning    {text}" for text in engine.get("warnings", ())]
    return "\n".join(lines)
