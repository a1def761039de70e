"""Measure what each linear costs when it alone is quantized, and propose a recipe that leaves the worst unquantized.

A float bundle runs in PyTorch, at the latents of its own float32 run, with one group of linears quantized after the
other. The recipe leaves as many groups unquantized, the most sensitive first, as the target needs; the error with that
recipe is measured as well.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import UsageError
from zimgkit.engines.files import replacing
from zimgkit.engines.torch.engine import TorchEngine
from zimgkit.export.networks.registry import QUANTIZED_GRAPHS, parts, sources
from zimgkit.export.quality.cost import velocity_errors
from zimgkit.export.quality.runs import Draw, Run, Trial, drawing, open_torch_in
from zimgkit.export.quantization.fake_quantization import quantizable, switch_quantization
from zimgkit.export.quantization.quantize import QuantizationSettings, linear_weights
from zimgkit.export.quantization.recipe import BLOCK_NUMBER
from zimgkit.runtime.progress import Report, silent

GROUPS = ("linear", "kind", "block")
"""What is quantized together: one linear, those of one name in all blocks, or those of one block."""


@dataclass(frozen=True)
class VelocityError:
    """The error of velocities against the float32 run."""

    relative_l2_error: float
    """The mean relative L2 error over pictures, branches of guidance and steps."""
    cosine: float
    """The smallest cosine over the same."""


@dataclass(frozen=True)
class Group:
    """Linears that are quantized together."""

    component: str
    pattern: str
    """The pattern of their names, as recipes have it."""
    weights: tuple[str, ...]
    """The names of their weights in the bundle."""
    parameters: int
    """The number of parameters of all these weights."""
    alone: VelocityError
    """The error with these linears quantized and no others."""


@dataclass(frozen=True)
class Sensitivity:
    """The errors of all groups, and the recipe that follows from them."""

    name: str
    """The checkpoint's name."""
    precision: str
    target: float
    """The smallest cosine that is acceptable."""
    groups: tuple[Group, ...]
    """The most sensitive first."""
    all_quantized: VelocityError
    """The error with all groups quantized."""
    unquantized: int
    """How many of the first groups the recipe leaves unquantized."""
    with_recipe: VelocityError
    """The error with the other groups quantized."""


def sensitivity(
    bundle: Bundle,
    settings: QuantizationSettings,
    trial: Trial,
    target: float,
    *,
    by: str = "linear",
    device: str | None = None,
    report: Report = silent,
) -> Sensitivity:
    """Measure every linear of the text encoder and the denoiser, and find how many have to stay unquantized.

    Args:
        bundle: an unquantized bundle.
        settings: how linears are quantized; the recipe is ignored.
        trial: the pictures whose velocities are compared.
        target: the smallest acceptable cosine of a velocity and the float32 network's.
        by: one of :data:`GROUPS`.
        device: as torch names devices.
        report: called with (stage, done, total).

    Raises:
        UsageError: the bundle is quantized, the settings do not fit each other, or the target is no cosine.
        BackendError: PyTorch cannot run a graph.
    """
    settings.check()
    if bundle.manifest.quantization is not None:
        raise UsageError(f"{bundle.root} is quantized", "name a bundle of --precision bf16 or fp32")
    if not 0 < target < 1:
        raise UsageError(f"the target {target:g} is no cosine to reach", "give a number below 1, such as 0.999")
    if by not in GROUPS:
        raise UsageError(f"linears are not grouped by {by!r}", f"choose one of {', '.join(GROUPS)}")
    trial = trial.filled(bundle.manifest)
    groups = _groups(bundle, settings, by)
    active: dict[str, set[str]] = {name: set() for name in QUANTIZED_GRAPHS}
    with drawing(bundle, partial(_open_switched, settings, active), device=device) as draw:
        expected = draw(trial, report=report)
        measured = partial(_measured, draw, trial, expected, active)
        found = []
        for index, group in enumerate(groups):
            report("quantize one by one", index, len(groups))
            found.append(replace(group, alone=measured([group])))
        report("quantize one by one", len(groups), len(groups))
        found.sort(key=lambda group: (group.alone.cosine, -group.alone.relative_l2_error))
        errors = {0: measured(found), len(found): VelocityError(0.0, 1.0)}
        # Bisect for the smallest number that reaches the target: more unquantized groups never raise the error by much.
        too_few, enough = 0, len(found)
        while errors[too_few].cosine < target and enough - too_few > 1:
            report("find a recipe", len(found) - (enough - too_few), len(found))
            middle = (too_few + enough) // 2
            errors[middle] = measured(found[middle:])
            too_few, enough = (too_few, middle) if errors[middle].cosine >= target else (middle, enough)
        report("find a recipe", len(found), len(found))
    count = 0 if errors[0].cosine >= target else enough
    return Sensitivity(bundle.manifest.name, settings.precision, target, tuple(found), errors[0], count, errors[count])


def proposed_recipe(found: Sensitivity) -> str:
    """Write the proposed recipe as TOML, as ``--recipe`` takes it."""
    lines = [
        f"# {found.name}, {found.precision}: which linears stay unquantized, as zimg-export sensitivity proposes.",
        f"# The smallest cosine of a velocity is {found.with_recipe.cosine:.6f} with it, and "
        f"{found.all_quantized.cosine:.6f} without.",
    ]
    for group in found.groups[: found.unquantized]:
        lines += [
            "",
            "[[keep]]",
            f"component = {_text(group.component)}",
            f"tensors = [{_text(group.pattern)}]",
            f"reason = {_text(f'cosine {group.alone.cosine:.6f} when quantized alone')}",
            f"source = {_text('zimg-export sensitivity')}",
            f"precisions = [{_text(found.precision)}]",
        ]
    return "\n".join([*lines, "", "[bounds]", f"{found.precision} = {{ cosine = {found.target} }}", ""])


def save_recipe(found: Sensitivity, path: Path) -> None:
    """Write the proposed recipe to a file, which is replaced in one step."""
    with replacing(path) as part:
        part.write_text(proposed_recipe(found), "utf-8")


def sensitivity_data(found: Sensitivity) -> dict[str, Any]:
    """Describe the result as ``--json`` prints it."""
    groups = [
        {
            "component": group.component,
            "tensors": group.pattern,
            "weights": list(group.weights),
            "parameters": group.parameters,
            "unquantized": index < found.unquantized,
            **vars(group.alone),
        }
        for index, group in enumerate(found.groups)
    ]
    return vars(found) | {
        "groups": groups,
        "all_quantized": vars(found.all_quantized),
        "with_recipe": vars(found.with_recipe),
    }


def sensitivity_text(found: Sensitivity) -> str:
    """Format the result for people: a line for each group, the most sensitive first."""
    width = max((len(group.pattern) for group in found.groups), default=0)
    lines = [f"{'quantized alone':<{width}}  component     parameters  relative L2 error    cosine"]
    for index, group in enumerate(found.groups):
        figures = f"{group.parameters:>12,}  {group.alone.relative_l2_error:>17.2e}  {group.alone.cosine:.6f}"
        lines.append(
            f"{group.pattern:<{width}}  {group.component:<12}{figures}{'  unquantized' * (index < found.unquantized)}"
        )
    total = sum(group.parameters for group in found.groups) or 1
    share = sum(group.parameters for group in found.groups[: found.unquantized]) / total
    errors = found.all_quantized
    lines.append(f"all quantized: relative L2 error {errors.relative_l2_error:.2e}, cosine {errors.cosine:.6f}")
    lines.append(
        f"{found.unquantized} of {len(found.groups)} unquantized, {share:.1%} of the weights: relative L2 error "
        f"{found.with_recipe.relative_l2_error:.2e}, cosine {found.with_recipe.cosine:.6f} (target {found.target:g})"
    )
    return "\n".join(lines)


def _groups(bundle: Bundle, settings: QuantizationSettings, by: str) -> list[Group]:
    """Group the linears that are quantized together, in the order of the graphs."""
    manifest = bundle.manifest
    groups: list[Group] = []
    for source in sources(manifest.family, manifest.tasks):
        for component, part in parts(manifest.family, source, manifest.config.get(source, {})).items():
            if component not in QUANTIZED_GRAPHS:
                continue
            parameters = linear_weights(part)
            weights = quantizable(bundle, component, settings)
            members: dict[str, list[str]] = defaultdict(list)
            for weight in weights:
                members[_pattern(_parameter(weight, parameters), by)].append(weight)
            for pattern, names in members.items():
                size = sum(int(np.prod(weights[name].shape)) for name in names)
                groups.append(Group(component, pattern, tuple(names), size, VelocityError(0.0, 1.0)))
    return groups


def _pattern(name: str, by: str) -> str:
    """The pattern, as recipes have it, of the group that a linear belongs to."""
    number = BLOCK_NUMBER.search(name)
    if by == "linear" or number is None:
        return name
    return f"{name[: number.end()]}.*" if by == "block" else f"{name[: number.start()]}*{name[number.end() :]}"


def _parameter(tensor: str, parameters: Iterable[str]) -> str:
    """The network's name of a tensor, which recipes use; the checkpoint's name may have a longer prefix."""
    return next(name for name in parameters if f".{tensor}".endswith(f".{name}"))


def _open_switched(
    settings: QuantizationSettings,
    active: dict[str, set[str]],
    bundle: Bundle,
    component: str,
    backend: str,
    device: str | None,
) -> TorchEngine:
    engine = open_torch_in("float32", bundle, component, backend, device)
    if component in QUANTIZED_GRAPHS:
        switch_quantization(engine, bundle, component, settings, active[component])
    return engine


def _measured(
    draw: Draw, trial: Trial, expected: Sequence[Run], active: dict[str, set[str]], groups: Iterable[Group]
) -> VelocityError:
    """Measure the error with these groups quantized and no others."""
    for names in active.values():
        names.clear()
    for group in groups:
        active[group.component].update(group.weights)
    errors = velocity_errors(expected, draw(trial, expected, forced=True))
    relative = [value for values, _ in errors for value in values]
    return VelocityError(float(np.mean(relative)), min(value for _, values in errors for value in values))


def _text(value: str) -> str:
    """Quote a string for TOML, whose escapes are those of JSON."""
    return json.dumps(value, ensure_ascii=False)
