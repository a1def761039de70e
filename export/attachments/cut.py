"""A plan of blocks cut into head, body and tail: three graphs over the same weights that do together what it does.

Block caching runs the head, compares what it gives with the last step's, and leaves the body out where little has
changed (First Block Cache, https://github.com/chengzeyi/ParaAttention). Values that one piece makes and another needs
become outputs of the one and inputs of the other under one name, so that a step is: give each piece what it asks for of
all that is there, and add what it gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem

from torch import fx

from zimgkit.engines.errors import CheckpointError
from zimgkit.export.graphs.plan import Plan, Results, named_shape
from zimgkit.export.networks.parts import Cut, Input

PIECES = ("head", "body", "tail")
"""All up to the first block; the other blocks; what follows."""


def cut(plan: Plan, where: Cut) -> dict[str, Plan]:
    """Cut a plan.

    Args:
        plan: of a network with blocks; stays as it is.
        where: what its blocks are called, and how values are named that cross.

    Returns:
        :data:`PIECES` -> its plan. The outputs of the plan are those of the pieces that make them. Its parameters are
        shared out, those of repeated calls to several.

    Raises:
        CheckpointError: the network has fewer than two blocks.
    """
    return _Cut(plan, where).pieces()


@dataclass(frozen=True)
class _Cut:
    plan: Plan
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
            names = [returned.get(node) or self._name(homes, node) for node in gives]
            takes = [self._input(homes, runs, node) for node in sorted(wanted[piece], key=order.__getitem__)]
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
        """The piece of every call that is in one piece only."""
        blocks = [node for node in self.plan.calls if self._is_block(node)]
        if len(blocks) < 2:
            raise CheckpointError(f"a network of {len(blocks)} blocks cannot be cut", "it takes two or more")
        homes, index = {}, 0
        for node in self.plan.calls:
            if node.target not in self.where.repeated:
                homes[node] = PIECES[index]
            index += node in (blocks[0], blocks[-1])
        return homes

    def _is_block(self, node: fx.Node) -> bool:
        return str(node.target).startswith(f"{self.where.blocks}.")

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

    def _name(self, homes: dict[fx.Node, str], node: fx.Node) -> str:
        """What a value that crosses is called."""
        call = _call(node)
        index = 0 if call is node else int(str(node.args[1]))
        if self._is_block(call):
            return f"{homes[call]}_{self.where.names[self.where.blocks][index]}"
        return self.where.names[str(call.target)][index]

    def _input(self, homes: dict[fx.Node, str], runs: tuple[Results, Results], node: fx.Node) -> Input:
        if node.op == "placeholder":
            places = [n for n in self.plan.graph.nodes if n.op == "placeholder"]
            return self.plan.inputs[places.index(node)]
        first, second = (run[node] for run in runs)
        return Input(self._name(homes, node), first.dtype, named_shape(first, second, self.plan.sizes))

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
