"""Values of a plan by names that people can write, and copies of its graph to change."""

from __future__ import annotations

from operator import getitem

from torch import fx

from zimgkit.export.graphs.plan import Plan

Value = str | tuple[str, int]
"""The name of an input, the qualified name of what is called once, or the latter with the index of one of its results.
"""


def copied(plan: Plan) -> fx.Graph:
    """A copy of a plan's graph; its inputs bear the names of the plan's."""
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    names = iter(plan.inputs)
    for node in plan.graph.nodes:
        known[node] = graph.node_copy(node, known.__getitem__)
        if node.op == "placeholder":
            known[node].target = next(names).name
    return graph


def find(graph: fx.Graph, value: Value) -> fx.Node:
    """The node of a value.

    Raises:
        KeyError: the graph has none.
    """
    name, index = (value, None) if isinstance(value, str) else value
    for node in graph.nodes:
        if node.op in ("placeholder", "call_module") and node.target == name:
            return node if index is None else _item(graph, node, index)
    raise KeyError(f"the plan has no input and no call {name!r}")


def _item(graph: fx.Graph, call: fx.Node, index: int) -> fx.Node:
    """The node of one of a call's results, which is made where there is none."""
    for user in call.users:
        if user.target is getitem and user.args[1] == index:
            return user
    with graph.inserting_after(call):
        return graph.call_function(getitem, (call, index))
