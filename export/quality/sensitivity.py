"""How much each linear costs when it alone is quantized, and a recipe that keeps the most sensitive of them.

A float bundle runs in PyTorch, on the latents that it has been to itself, with one group of linears quantized after the
other. The recipe keeps as many of them, the most sensitive first, as a target needs; that it holds is measured.
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
from zimgkit.export.networks.registry import FAMILIES, QUANTIZED_GRAPHS, parts
from zimgkit.export.quality.cost import Draw, Run, Trial, drawing, open_torch_in, velocity_errors
from zimgkit.export.quantization.fake_quantization import quantizable, switch
from zimgkit.export.quantization.quantize import QuantizationSettings, linear_weights
from zimgkit.export.quantization.recipe import DIGITS
from zimgkit.runtime.progress import Report, silent

GROUPS = ("linear", "kind", "block")
"""What is quantized together: one linear, those of one name in all blocks, or those of one block."""


@dataclass(frozen=True)
class Error:
    """Of velocities."""

    relative: float
    """The mean over pictures, branches of guidance and steps."""
    cosine: float
    """The least of them."""


@dataclass(frozen=True)
class Group:
    """Linears that are quantized together."""

    component: str
    pattern: str
    """As recipes have it."""
    weights: tuple[str, ...]
    parameters: int
    """How many numbers the weights have together."""
    alone: Error
    """With these quantized and no others."""


@dataclass(frozen=True)
class Sensitivity:
    """What was found."""

    name: str
    """Of the checkpoint."""
    precision: str
    target: float
    groups: tuple[Group, ...]
    """The most sensitive first."""
    all: Error
    """With all of them quantized."""
    kept: int
    """How many of the first groups the recipe keeps."""
    rest: Error
    """With the others quantized."""


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
    """Measure every linear of the text encoder and the denoiser, and find how many have to stay as they are.

    Args:
        bundle: one that is not quantized.
        settings: how linears are quantized; the recipe is not regarded.
        trial: the pictures whose velocities count.
        target: the least cosine of a velocity and the float32 network's that will do.
        by: one of :data:`GROUPS`.
        device: as torch names devices.
        report: called with (stage, done, total).

    Raises:
        UsageError: the bundle is quantized, the settings do not fit each other, or the target is no cosine.
        BackendError: PyTorch cannot run it.
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
        found.sort(key=lambda group: (group.alone.cosine, -group.alone.relative))
        errors = {0: measured(found), len(found): Error(0.0, 1.0)}
        # The least number that holds: what is kept more never makes it worse, but for the last digits.
        fails, holds = 0, len(found)
        while errors[fails].cosine < target and holds - fails > 1:
            report("find a recipe", len(found) - (holds - fails), len(found))
            middle = (fails + holds) // 2
            errors[middle] = measured(found[middle:])
            fails, holds = (fails, middle) if errors[middle].cosine >= target else (middle, holds)
        report("find a recipe", len(found), len(found))
    kept = 0 if errors[0].cosine >= target else holds
    return Sensitivity(bundle.manifest.name, settings.precision, target, tuple(found), errors[0], kept, errors[kept])


def proposed_recipe(found: Sensitivity) -> str:
    """The recipe that is proposed, as ``--recipe`` takes it."""
    lines = [
        f"# {found.name}, {found.precision}: which linears stay as they are, as zimg-export sensitivity proposes.",
        f"# The least cosine of a velocity is {found.rest.cosine:.6f} by it, and {found.all.cosine:.6f} without.",
    ]
    for group in found.groups[: found.kept]:
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
    """Write the recipe to a file, beside it first."""
    with replacing(path) as part:
        part.write_text(proposed_recipe(found), "utf-8")


def sensitivity_data(found: Sensitivity) -> dict[str, Any]:
    """For machines."""
    groups = [
        {
            "component": group.component,
            "tensors": group.pattern,
            "weights": list(group.weights),
            "parameters": group.parameters,
            "kept": index < found.kept,
            **vars(group.alone),
        }
        for index, group in enumerate(found.groups)
    ]
    return vars(found) | {"groups": groups, "all": vars(found.all), "rest": vars(found.rest)}


def sensitivity_text(found: Sensitivity) -> str:
    """For people: the groups, the most sensitive first."""
    width = max((len(group.pattern) for group in found.groups), default=0)
    lines = [f"{'quantized alone':<{width}}  component     parameters  relative error    cosine"]
    for index, group in enumerate(found.groups):
        figures = f"{group.parameters:>12,}  {group.alone.relative:>14.2e}  {group.alone.cosine:.6f}"
        lines.append(f"{group.pattern:<{width}}  {group.component:<12}{figures}{'  kept' * (index < found.kept)}")
    total = sum(group.parameters for group in found.groups) or 1
    share = sum(group.parameters for group in found.groups[: found.kept]) / total
    lines.append(f"all of them: relative error {found.all.relative:.2e}, cosine {found.all.cosine:.6f}")
    lines.append(
        f"{found.kept} of {len(found.groups)} kept, {share:.1%} of the weights: relative error "
        f"{found.rest.relative:.2e}, cosine {found.rest.cosine:.6f} (target {found.target:g})"
    )
    return "\n".join(lines)


def _groups(bundle: Bundle, settings: QuantizationSettings, by: str) -> list[Group]:
    """What is quantized together, in the order of the graphs."""
    manifest = bundle.manifest
    groups: list[Group] = []
    for source in FAMILIES[manifest.family].components:
        for component, part in parts(manifest.family, source, manifest.config[source]).items():
            if component not in QUANTIZED_GRAPHS:
                continue
            parameters = linear_weights(part)
            weights = quantizable(bundle, component, settings)
            members: dict[str, list[str]] = defaultdict(list)
            for weight in weights:
                members[_pattern(_parameter(weight, parameters), by)].append(weight)
            for pattern, names in members.items():
                size = sum(int(np.prod(weights[name].shape)) for name in names)
                groups.append(Group(component, pattern, tuple(names), size, Error(0.0, 1.0)))
    return groups


def _pattern(name: str, by: str) -> str:
    """The recipe's pattern of a linear's group."""
    number = DIGITS.search(name)
    if by == "linear" or number is None:
        return name
    return f"{name[: number.end()]}.*" if by == "block" else f"{name[: number.start()]}*{name[number.end() :]}"


def _parameter(tensor: str, parameters: Iterable[str]) -> str:
    """The network's own name, which recipes use, of a tensor that the checkpoint may store under a longer one."""
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
        switch(engine, bundle, component, settings, active[component])
    return engine


def _measured(
    draw: Draw, trial: Trial, expected: Sequence[Run], active: dict[str, set[str]], groups: Iterable[Group]
) -> Error:
    """The error with some groups quantized."""
    for names in active.values():
        names.clear()
    for group in groups:
        active[group.component].update(group.weights)
    errors = velocity_errors(expected, draw(trial, expected, forced=True))
    relative = [value for values, _ in errors for value in values]
    return Error(float(np.mean(relative)), min(value for _, values in errors for value in values))


def _text(value: str) -> str:
    """A string of TOML, whose escapes are those of JSON."""
    return json.dumps(value, ensure_ascii=False)
