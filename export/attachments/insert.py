"""More inputs and more calls in a plan: how a ControlNet, a mask or an adapter comes into a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from zimgkit.export.attachments.values import Value, copied, find
from zimgkit.export.graphs.plan import Plan, Sizes
from zimgkit.export.networks.parts import Input


def add_input(plan: Plan, entry: Input, sizes: Sizes = ({}, {})) -> Plan:
    """Add an input after those that there are.

    Args:
        plan: stays as it is.
        entry: the input.
        sizes: two lengths of each of its dynamic dimensions that the plan does not have yet.

    Raises:
        ValueError: there is an input of this name.
    """
    if any(known.name == entry.name for known in plan.inputs):
        raise ValueError(f"the plan has an input {entry.name!r} already")
    graph = copied(plan)
    first_call = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first_call):
        graph.placeholder(entry.name)
    first, second = ({**known, **new} for known, new in zip(plan.sizes, sizes, strict=True))
    return replace(plan, graph=graph, inputs=(*plan.inputs, entry), sizes=(first, second))


def add_call(plan: Plan, name: str, module: nn.Module, arguments: Sequence[Value]) -> Plan:
    """Add a call of a module with one result, which nothing takes yet.

    The arguments and errors are those of :func:`insert_call`.
    """
    return _with_call(plan, name, module, arguments, None)


def insert_call(plan: Plan, name: str, module: nn.Module, arguments: Sequence[Value], replaces: Value) -> Plan:
    """Add a call of a module, whose result all that follows takes in the place of another value.

    After block i of a network whose blocks hand on one value, ``insert_call(plan, "control.3", module, ("layers.3",
    "hint"), "layers.3")`` lets block i + 1 take what the module makes of block i's result and the input ``hint``.

    Args:
        plan: stays as it is.
        name: of the module; its parameters are named ``<name>.<parameter>``.
        module: on the meta device, in the element type it computes in; it has one result.
        arguments: what it is called with.
        replaces: what its result replaces in all calls after it, and in what the plan returns.

    Raises:
        ValueError: the plan calls something of this name.
        KeyError: there is no such value.
    """
    return _with_call(plan, name, module, arguments, replaces)


def _with_call(plan: Plan, name: str, module: nn.Module, arguments: Sequence[Value], replaces: Value | None) -> Plan:
    if name in plan.modules:
        raise ValueError(f"the plan calls {name!r} already")
    graph = copied(plan)
    given = [find(graph, value) for value in arguments]
    old = None if replaces is None else find(graph, replaces)
    order = {node: index for index, node in enumerate(graph.nodes)}
    last = max((*given, *([old] if old else [])), key=order.__getitem__)
    if last.op == "placeholder":  # Inputs stand before all calls.
        last = max(graph.find_nodes(op="placeholder"), key=order.__getitem__)
    with graph.inserting_after(last):
        new = graph.create_node("call_module", name, tuple(given))
    if old is not None:
        old.replace_all_uses_with(new, lambda user: user is not new and order[user] > order[last])
    modules: Mapping[str, nn.Module] = {**plan.modules, name: module}
    return replace(plan, graph=graph, modules=modules)
