"""The options of ``zimg-export compile``, which ``build --backend tensorrt`` takes as well."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import click

from zimgkit.engines.errors import UsageError
from zimgkit.export.cli.options import Command, add_options
from zimgkit.runtime.memory.amounts import parse_bytes

OPTIONS = (
    click.option(
        "--size", "sizes", multiple=True, metavar="WxH", help="Serve this one size, fastest; may be repeated."
    ),
    click.option("--min-size", metavar="WxH", help="The smallest size of a range up to --max-size. [default: 256x256]"),
    click.option(
        "--opt-size", metavar="WxH", help="The size that a range is optimized for. [default: the checkpoint's]"
    ),
    click.option("--max-size", metavar="WxH", help="Serve a range of sizes, up to this one."),
    click.option(
        "--max-prompt-tokens", type=int, metavar="N", help="The longest prompt to serve, in tokens. [default: 512]"
    ),
    click.option(
        "--batch",
        type=int,
        default=1,
        show_default=True,
        help="How many pictures of a prompt are denoised together, at most.",
    ),
    click.option(
        "--component",
        "components",
        multiple=True,
        metavar="NAME",
        help="Compile this component alone; may be repeated. [default: all but the pieces of denoisers]",
    ),
    click.option(
        "--weight-streaming-budget",
        metavar="BYTES",
        help="Keep this much of each component's weights on the device (8GB), and stream the rest.",
    ),
    click.option("--workspace", metavar="BYTES", help="The scratch memory that a layer may take (4GB). [default: all]"),
    click.option(
        "--optimization-level",
        type=click.IntRange(0, 5),
        help="How long to search for fast kernels: 0 compiles fastest. [default: 3]",
    ),
    click.option(
        "--refittable", is_flag=True, help="Make plans that take other weights later, and may run slower; unproven."
    ),
    click.option(
        "--stripped", is_flag=True, help="Make plans without weights, which are loaded from the bundle; unproven."
    ),
    click.option(
        "--plugins", is_flag=True, help="Give norms and rotations of attention kernels of zimgkit's own; untested."
    ),
    click.option("--force", is_flag=True, help="Compile engines that are up to date as well."),
    click.option("--detailed", is_flag=True, help="List every layer of every plan."),
)


def compile_options(command: Command) -> Command:
    """Add the options of a compilation."""
    return add_options(OPTIONS, command)


def first_given(context: click.Context) -> str | None:
    """The first of these options that stands on the command line, as it is typed; None where there is none."""
    names = {*inspect.signature(compile_arguments).parameters, "detailed"}
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in names and source == click.core.ParameterSource.COMMANDLINE:
            return parameter.opts[0]
    return None


def compile_arguments(
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
    plugins: bool,
    force: bool,
) -> dict[str, Any]:
    """Turn the options into arguments of :func:`zimgkit.export.compilers.compile.compile_bundle`.

    Raises:
        UsageError: a size or an amount of memory cannot be parsed, or a min or opt size without a max.
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
            workspace_bytes=parse_bytes(workspace) if workspace is not None else None,
            refittable=refittable,
            stripped=stripped,
            plugins=plugins,
            optimization_level=optimization_level,
        ),
        "weight_streaming_budget": parse_bytes(weight_streaming_budget)
        if weight_streaming_budget is not None
        else None,
        "force": force,
    }
