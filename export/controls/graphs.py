"""The graphs of a denoiser with ControlNets, over its own weight files and theirs.

Each net has a variant of the denoiser of its own; where several can act together there is one more with all of these.
So a call pays for the nets that it asks for, unless it asks for some of many. A graph has half a megabyte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from zimgkit.engines.bundle import Component
from zimgkit.engines.tensors.safetensors import TensorInfo
from zimgkit.export.attachments.control import controlled, prefix
from zimgkit.export.controls.nets import COMPONENT, DENOISER, component_of, named
from zimgkit.export.graphs.assemble import assemble_all
from zimgkit.export.graphs.plan import Plan
from zimgkit.export.networks.parts import ControlNet, Part
from zimgkit.export.writing import Rewrite, pieces_of, plans_of, write_graphs


def groups(nets: Mapping[str, ControlNet]) -> dict[str, tuple[str, ...]]:
    """The variants of a denoiser that has some nets -> the names of those that each has."""
    together = tuple(name for name, net in nets.items() if net.combines)
    alone = {component_of(name): (name,) for name in nets}
    return alone | ({COMPONENT: together} if len(together) > 1 else {})


def write_controlled(
    part: Part,
    nets: Mapping[str, ControlNet],
    wanted: Mapping[str, tuple[str, ...]],
    entry: Component,
    tensors: Mapping[str, TensorInfo],
    of_nets: Mapping[str, Mapping[str, TensorInfo]],
    precision: str,
    folder: Path,
    rewrite: Rewrite | None = None,
    *,
    is_cut: bool = False,
    suffix: str = "",
) -> dict[str, Component]:
    """Write the graphs of a denoiser with nets.

    Args:
        part: the denoiser.
        nets: every net by name.
        wanted: of :func:`groups`, those to write.
        entry: the denoiser's in the manifest.
        tensors: its parameters and their scales, where they lie in the bundle.
        of_nets: net -> its parameters, likewise.
        precision: the element type of the bundle's weights.
        folder: the bundle's.
        rewrite: called with every graph before it is saved.
        is_cut: whether the denoiser was cut when its graphs were written.
        suffix: of the files' names.

    Returns:
        Their entries in the manifest.
    """
    every = dict(tensors)
    for name, placed in of_nets.items():
        every |= named(placed, name)
    shapes = part.parameters() | {prefix(n) + key: s for n, net in nets.items() for key, s in net.parameters().items()}
    plain = {key: replace(every[key], dtype=precision, shape=shape) for key, shape in shapes.items() if key in every}
    sizes = {info.name: info.nbytes for info in every.values()}
    found: dict[str, Component] = {}
    for compute in dict.fromkeys((precision, "float32")):
        before = plans_of(DENOISER, part, compute, is_cut=is_cut)
        plans: dict[str, Plan] = {}
        groups_of: dict[str, tuple[str, ...]] = {}
        for key, names in wanted.items():
            plan = controlled(part, {name: nets[name] for name in names}, getattr(torch, compute))
            own_plans = {key: plan} | (pieces_of(key, plan, part.cut) if is_cut else {})
            plans |= own_plans
            groups_of |= dict.fromkeys(own_plans, names)
        made = assemble_all([*plans.values()], plain, folder, [*before.values()])
        for (key, plan), assembled in zip(plans.items(), made, strict=True):
            own = found.get(key) or _entry(entry, {name: of_nets[name] for name in groups_of[key]}, folder)
            found[key] = write_graphs(key, plan, assembled, own, (compute, precision), folder, sizes, rewrite, suffix)
    return found


def _entry(denoiser: Component, nets: Mapping[str, Mapping[str, TensorInfo]], folder: Path) -> Component:
    """A variant's files, to begin with: those of the denoiser, what LoRAs touch last, and those of its nets."""
    prefixes = {
        info.file.relative_to(folder).as_posix(): prefix(name) for name, own in nets.items() for info in own.values()
    }
    lora = (denoiser.lora,) if denoiser.lora else ()
    weights = (*(file for file in denoiser.weights if file not in lora), *prefixes, *lora)
    return msgspec.structs.replace(denoiser, weights=weights, prefixes=prefixes, graphs={}, variant_of=DENOISER)
