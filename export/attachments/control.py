"""A denoiser with ControlNets: more inputs, and calls whose results are added to what its blocks give.

Nets that act together all read what a block gave before any of them added to it, as in DiffSynth-Studio.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from zimgkit.engines.errors import UsageError
from zimgkit.export.attachments.insert import add_call, add_input, insert_call
from zimgkit.export.attachments.values import Value
from zimgkit.export.graphs.plan import Plan, record
from zimgkit.export.networks.parts import SCALE, ControlNet, Input, Part


class AddControl(nn.Module):
    """What a net gives, added."""

    def forward(self, x: Tensor, control: Tensor) -> Tensor:
        """Two of one shape and type -> their sum."""
        return x + control


def prefix(name: str) -> str:
    """What the names of a net's parameters begin with in a denoiser that has it."""
    return f"control.{name}."


def controlled(denoiser: Part, nets: Mapping[str, ControlNet], compute: torch.dtype) -> Plan:
    """The plan of a denoiser with nets.

    Args:
        denoiser: the one that they control.
        nets: name -> net.
        compute: the element type that it computes in.

    Raises:
        UsageError: nets that cannot act together.
    """
    woven = [(name, net) for name, net in nets.items() if net.woven is not None]
    if woven:
        if len(nets) > 1:
            raise UsageError(f"{' and '.join(nets)} cannot act together", "give one of them")
        ((name, net),) = woven
        whole = replace(denoiser, network=lambda: net.woven(name) if net.woven else nn.Identity())
        inputs = (*denoiser.inputs, *_inputs(name, net))
        first, second = ({**own, **more} for own, more in zip(denoiser.sizes, net.sizes, strict=True))
        return record(whole.build(compute), inputs, denoiser.outputs, (first, second))
    plan = record(denoiser.build(compute), denoiser.inputs, denoiser.outputs, denoiser.sizes)
    added: dict[Value, Value] = {}
    for name, net in nets.items():
        plan = _insert(plan, name, net, compute, added)
    return plan


def _insert(plan: Plan, name: str, net: ControlNet, compute: torch.dtype, added: dict[Value, Value]) -> Plan:
    """Add one net to a plan.

    Args:
        plan: stays as it is.
        name: of the net.
        net: the net.
        compute: the element type that it computes in.
        added: a value of the denoiser -> what it is with all that was added to it so far; added to.
    """
    with torch.device("meta"):
        network = net.network().to(compute).eval()
    inputs = _inputs(name, net)
    for entry in inputs:
        plan = add_input(plan, entry, net.sizes)
    *given, scale = (entry.name for entry in inputs)
    condition = prefix(name) + net.condition
    plan = add_call(plan, condition, network.get_submodule(net.condition), given)
    for child, value in net.blocks.items():
        call, total = prefix(name) + child, f"{prefix(name)}{child}.added"
        plan = add_call(plan, call, network.get_submodule(child), (value, condition, scale))
        plan = insert_call(plan, total, AddControl(), (before := added.get(value, value), call), before)
        added[value] = total
    return plan


def _inputs(name: str, net: ControlNet) -> tuple[Input, ...]:
    """The inputs of a net, named after it."""
    if net.inputs[-1] != SCALE:
        raise ValueError(f"the last input of a {net.kind} net is not its scale")
    return tuple(replace(entry, name=f"{entry.name}.{name}") for entry in net.inputs)
