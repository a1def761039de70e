"""The options of ``zimg-export compile``, which ``build --backend tensorrt`` takes as well, and what they print."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from zimgkit.engines.errors import UsageError
from zimgkit.export.compilers.tensorrt import layers
from zimgkit.runtime.commands.inspect import range_text

if TYPE_CHECKING:
    from zimgkit.export.compilers.compile import CompiledComponent

Command = TypeVar("Command", bound=Callable[..., Any])
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
MOST = 1 << 63
"""What no amount of bytes reaches."""

OPTIONS = (
    click.option("--size", "sizes", multiple=True, metavar="WxH", help="Serve this size, fastest; may be repeated."),
    click.option("--min-size", metavar="WxH", help="The min of the range up to --max-size. [default: 256x256]"),
    click.option("--opt-size", metavar="WxH", help="The size that range is optimized for. [default: the checkpoint's]"),
    click.option("--max-size", metavar="WxH", help="Serve a range of sizes, up to this one."),
    click.option("--max-prompt-tokens", type=int, metavar="N", help="Of a prompt. [default: 512]"),
    click.option("--batch", type=int, default=1, show_default=True, help="Pictures of a prompt denoised together."),
    click.option("--component", "components", multiple=True, metavar="NAME", help="Only this one; may be repeated."),
    click.option(
        "--weight-streaming-budget",
        metavar="BYTES",
        help="Keep so much of each component's weights on the device (8GB), and stream the rest.",
    ),
    click.option("--workspace", metavar="BYTES", help="Scratch memory a layer may take (4GB). [default: all]"),
    click.option(
        "--optimization-level", type=click.IntRange(0, 5), help="0 compiles fastest, 5 searches longest. [default: 3]"
    ),
    click.option("--refittable", is_flag=True, help="Weights can be exchanged later; may run slower. Unproven."),
    click.option("--stripped", is_flag=True, help="Plans without weights, which are taken from the bundle. Unproven."),
    click.option("--force", is_flag=True, help="Compile what is up to date as well."),
    click.option("--detailed", is_flag=True, help="List every layer of every plan."),
)


def options(command: Command) -> Command:
    """Give a command the options of a compilation."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def given(context: click.Context) -> str | None:
    """The first of these options that the user gave, or None."""
    names = {*inspect.signature(settings).parameters, "detailed"}
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in names and source == click.core.ParameterSource.COMMANDLINE:
            return parameter.opts[0]
    return None


def parse_bytes(text: str | None) -> int | None:
    """``"8GB"`` or ``"512MiB"`` to bytes; None stays None.

    Raises:
        UsageError: it is no such text.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)\s*([KMG]?I?B|)", text.strip().upper())
    amount = int(Fraction(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else MOST
    if amount >= MOST:
        raise UsageError(f"{text!r} is no amount of memory", "give bytes, such as 8GB or 512MiB")
    return amount


def settings(
    *,
    sizes: Sequence[str],
    min_size: str | None,
    opt_size: str | None,
    max_size: str | None,
    max_prompt_tokens: int | None,
    batch: int,
    components: Sequence[str],
    weight_streaming_budget: str | None,
    workspace: str | None,
    optimization_level: int | None,
    refittable: bool,
    stripped: bool,
    force: bool,
) -> dict[str, Any]:
    """The options as arguments of :func:`zimgkit.export.compilers.compile.compile_bundle`.

    Raises:
        UsageError: a size or an amount that is none, or a min or opt size without a max.
    """
    from zimgkit.export.compilers.shape_profiles import ServedShapes, parse_size
    from zimgkit.export.compilers.tensorrt.compiler import CompilerOptions

    if (min_size or opt_size) and not max_size:
        raise UsageError("--min-size and --opt-size need --max-size", "give all three, or --size")
    smallest, optimal = (parse_size(text) if text else None for text in (min_size, opt_size))
    size_range = (smallest, optimal, parse_size(max_size)) if max_size else None
    return {
        "shapes": ServedShapes(tuple(map(parse_size, sizes)), size_range, max_prompt_tokens, batch),
        "components": tuple(components),
        "options": CompilerOptions(
            workspace_bytes=parse_bytes(workspace),
            refittable=refittable,
            stripped=stripped,
            optimization_level=optimization_level,
        ),
        "weight_streaming_budget": parse_bytes(weight_streaming_budget),
        "force": force,
    }


def as_data(bundle: Path, compiled: Sequence[CompiledComponent], *, detailed: bool) -> dict[str, Any]:
    """What was compiled, for machines."""
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


def as_text(data: dict[str, Any]) -> str:
    """The same for people."""
    lines = []
    for engine in data["engines"]:
        fused, parts = engine.get("attention", (0, 0))
        state = "up to date" if engine["up_to_date"] else f"{engine['bytes'] / 1e6:,.1f} MB"
        lines.append(f"{engine['component']}  {state}  {engine['file']}")
        for profile in engine["profiles"]:
            lines.append("  serves     " + ", ".join(f"{side} {range_text(ends)}" for side, ends in profile.items()))
        if fused + parts:
            lines.append(f"  attention  {fused} of {fused + parts} in one fused kernel each")
        if engine.get("unfused_attention"):
            lines.append(f"  in parts   {', '.join(engine['unfused_attention'])}")
        in_8_bits, wide = engine.get("products", (0, 0))
        if in_8_bits + wide:
            lines.append(f"  products   {in_8_bits} of {in_8_bits + wide} of quantized numbers in 8 bits")
        if engine.get("not_in_8_bits"):
            lines.append(f"  wider      {', '.join(engine['not_in_8_bits'])}")
        if engine.get("layer_kinds"):
            lines.append("  layers     " + ", ".join(f"{n} {kind}" for kind, n in engine["layer_kinds"].items()))
        lines += [f"    {layer['kind']:16} {layer['name']}" for layer in engine.get("layers", ())]
        lines += [f"  warning    {text}" for text in engine.get("warnings", ())]
    return "\n".join(lines)
