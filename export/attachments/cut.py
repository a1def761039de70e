"""A plan of blocks cut into head, body and tail: three graphs over the same weights that do together what it does.

The head is the first block and all that it needs, the tail is what follows the last one. The body gives the
difference between the stream that the tail takes and the one that the head gives, as the *residual*, which the tail
adds again. So a step of a cache is the head and the tail, with residuals that the body gave in steps before.

Values that one piece makes and another needs become outputs of the one and inputs of the other under one name: a step
is to give each piece what it asks for of all that is there, and to add what it gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import getitem

import torch
from torch import fx

from zimgkit.engines.bundle import PIECES
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.attachments.values import copied
from zimgkit.export.graphs.plan import Plan, Results, named_shape
from zimgkit.export.networks.parts import Cut, Input
from zimgkit.export.networks.pieces import Change, Residual, Restore

HEAD, BODY, TAIL = PIECES
WEIGHTS = Input("weights", torch.float32, (2,))
"""Of the residual, and of the older one."""


def cut(plan: Plan, where: Cut) -> dict[str, Plan]:
    """Cut a plan.

    Args:
        plan: of a network with blocks; stays as it is.
        where: what its blocks and its tail are called, and how values are named that cross.

    Returns:
        :data:`PIECES` -> its plan. Outputs of the head are what crosses and ``change``, of which
        :class:`Change` tells; that of the body is ``residual``, float32. The tail has the plan's own, and takes
        ``residual``, ``older_residual`` of the same shape and ``weights`` of both. Parameters are shared out.

    Raises:
        CheckpointError: the network has fewer than two blocks.
    """
    return _Cut(_with_residual(plan, where), where).pieces()


def _with_residual(plan: Plan, where: Cut) -> Plan:
    """The same, whose tail takes the stream from the head and residuals, and that returns how that changes."""
    blocks = [node for node in plan.calls if where.is_block(node)]
    if len(blocks) < 2:
        raise CheckpointError(f"a network of {len(blocks)} blocks cannot be cut", "it takes two or more")
    tail = [node for node in plan.calls if node.target in where.tail]
    body = _descendants(blocks[0]) - {*tail, *(item for call in tail for item in call.users)}
    (stream,) = {node for call in tail for node in call.all_input_nodes if node in body}
    shape = named_shape(plan.run(0)[stream], plan.run(1)[stream], plan.sizes)
    graph = copied(plan)
    new = dict(zip(plan.graph.nodes, graph.nodes, strict=True))
    first, last = new[blocks[0]], new[stream]
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        older, weights = graph.placeholder("older_residual"), graph.placeholder(WEIGHTS.name)
    is_item = len(where.names[where.blocks]) > 1
    head = next(user for user in first.users if user.args[1] == 0) if is_item else first
    with graph.inserting_before(new[tail[0]]):
        change = graph.create_node("call_module", "cut.change", (first.args[0], head))
        residual = graph.create_node("call_module", "cut.residual", (head, last))
        restored = graph.create_node("call_module", "cut.restore", (head, residual, older, weights))
    for call in tail:
        new[call].replace_input_with(last, restored)
    (output,) = graph.find_nodes(op="output")
    output.args = ((*(new[node] for node in plan.results), change),)
    return replace(
        plan,
        graph=graph,
        modules={**plan.modules, "cut.change": Change(), "cut.residual": Residual(), "cut.restore": Restore()},
        inputs=(*plan.inputs, Input("older_residual", torch.float32, shape), WEIGHTS),
        outputs=(*plan.outputs, "change"),
    )


@dataclass(frozen=True)
class _Cut:
    plan: Plan
    """As :func:`_with_residual` makes it."""
    where: Cut

    def pieces(self) -> dict[str, Plan]:
        """The plans of the pieces."""
        homes, order = self._homes(), {node: index for index, node in enumerate(self.plan.graph.nodes)}
        wanted = {piece: self._wanted(homes, piece) for piece in PIECES}
        crossing = {node for nodes in wanted.values() for node in nodes if node.op != "placeholder"}
        returned = dict(zip(self.plan.results, self.plan.outputs, strict=True))
        runs = self.plan.run(0), self.plan.run(1)
        found = {}
        for piece in PIECES:
            own = [node for node in crossing | returned.keys() if homes.get(_call(node)) == piece]
            gives = sorted(own, key=order.__getitem__)
            names = [returned.get(node) or self._name(runs, node) for node in gives]
            takes = [self._input(runs, node) for node in sorted(wanted[piece], key=order.__getitem__)]
            graph = self._graph(homes, piece, sorted(wanted[piece], key=order.__getitem__), takes, gives)
            targets = {str(node.target) for node in graph.find_nodes(op="call_module")}
            own_parameters = {str(node.target) for node in graph.find_nodes(op="get_attr")}
            found[piece] = Plan(
                f"{self.plan.name}{piece.title()}",
                graph,
                {name: module for name, module in self.plan.modules.items() if name in targets},
                {name: value for name, value in self.plan.own.items() if name in own_parameters},
                tuple(takes),
                tuple(names),
                self.plan.sizes,
            )
        return found

    def _homes(self) -> dict[fx.Node, str]:
        """The piece of every call that is in one piece only. What the first block does not need is not in the head."""
        first = next(node for node in self.plan.calls if self.where.is_block(node))
        head = {first, *_ancestors(first)}
        homes = {}
        for node in self.plan.calls:
            if node in head or node.target == "cut.change":
                homes[node] = HEAD
            else:
                homes[node] = TAIL if node.target in (*self.where.tail, "cut.restore") else BODY
        return {node: home for node, home in homes.items() if node.target not in self.where.repeated}

    def _wanted(self, homes: dict[fx.Node, str], piece: str) -> set[fx.Node]:
        """The values that a piece takes from outside: inputs of the plan, and what earlier pieces make."""
        found: set[fx.Node] = set()
        pending = [a for node, home in homes.items() if home == piece for a in node.all_input_nodes]
        while pending:
            node = pending.pop()
            call = _call(node)
            if call.op == "placeholder" or homes.get(call, piece) != piece:
                found.add(node)
            elif call.op == "call_module" and call not in homes:
                pending += call.all_input_nodes
        return found

    def _name(self, runs: tuple[Results, Results], node: fx.Node) -> str:
        """What a value that crosses is called."""
        call = _call(node)
        index = 0 if call is node else int(str(node.args[1]))
        if self.where.is_block(call):
            return f"{HEAD}_{self.where.names[self.where.blocks][index]}"
        if call.target == "cut.residual":
            return "residual"
        names = self.where.names.get(str(call.target), ())
        many = len(runs[0][call]) if isinstance(runs[0][call], tuple) else 1
        index += many * [other for other in self.plan.calls if other.target == call.target].index(call)
        return names[index] if index < len(names) else f"{call.name}_{index}"

    def _input(self, runs: tuple[Results, Results], node: fx.Node) -> Input:
        if node.op == "placeholder":
            places = [n for n in self.plan.graph.nodes if n.op == "placeholder"]
            return self.plan.inputs[places.index(node)]
        first, second = (run[node] for run in runs)
        return Input(self._name(runs, node), first.dtype, named_shape(first, second, self.plan.sizes))

    def _graph(
        self, homes: dict[fx.Node, str], piece: str, takes: list[fx.Node], inputs: list[Input], gives: list[fx.Node]
    ) -> fx.Graph:
        """The calls of a piece, and those that are repeated in it."""
        graph = fx.Graph()
        known = {node: graph.placeholder(entry.name) for node, entry in zip(takes, inputs, strict=True)}

        def node_of(node: fx.Node) -> fx.Node:
            if node not in known:
                for argument in node.all_input_nodes:
                    node_of(argument)
                known[node] = graph.node_copy(node, known.__getitem__)
            return known[node]

        for node, home in homes.items():
            if home == piece:
                node_of(node)
        results = tuple(node_of(node) for node in gives)
        graph.output(results[0] if len(results) == 1 else results)
        return graph


def _call(node: fx.Node) -> fx.Node:
    """What a value is a result of."""
    if node.target is getitem and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return node


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """All that a value follows from."""
    return _reached([node], lambda one: one.all_input_nodes)


def _descendants(node: fx.Node) -> set[fx.Node]:
    """All that follows from a value."""
    return _reached([node], lambda one: [*one.users])


def _reached(pending: list[fx.Node], neighbours: Callable[[fx.Node], list[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    while pending:
        new = [node for node in neighbours(pending.pop()) if node not in found]
        found.update(new)
        pending += new
    return found
