"""Find the places of a graph that compute what an operator of ours does, and call the operator there.

The body of an operator is the pattern: the same operators, of the same inputs, with the same attributes. Factors and
addends may come in either order, casts between float types may be missing, and a zero point of zeros is one left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import permutations
from typing import TYPE_CHECKING, Any, NamedTuple

from zimgkit.plugins.definition import DOMAIN, Definition

if TYPE_CHECKING:
    import onnx_ir as ir

COMMUTATIVE = {"Add", "Mul"}
CASTS = {"Cast", "CastLike"}
DEFAULTS: dict[str, Any] = {"alpha": 1.0, "beta": 1.0, "block_size": 0, "stash_type": 1, "transA": 0, "axis": 1}
"""Attributes that a graph may spell out, although they have the value that they have anyway."""


class Found(NamedTuple):
    """What stands for the values, attributes and nodes of a pattern in a graph, as far as it is known."""

    values: dict[ir.Value, ir.Value]
    attributes: dict[str, Any]
    nodes: tuple[ir.Node, ...]

    def bound(self, pattern: ir.Value, value: ir.Value) -> Found:
        """With one more value."""
        return self._replace(values={**self.values, pattern: value})


def rewrite(model: ir.Model, definitions: Iterable[Definition]) -> Counter[str]:
    """Call operators wherever a model computes what they do.

    Args:
        model: it is changed: its functions, its graph, and the functions of the operators that are called now.
        definitions: the operators, those with larger bodies first.

    Returns:
        How many places there are of each, in the functions and the graph as they are written.
    """
    counts: Counter[str] = Counter()
    bodies: list[ir.Function | ir.Graph] = [*model.functions.values(), model.graph]
    for definition in definitions:
        function = definition.function()
        for body in bodies:
            places = _replace(body, function, definition)
            if places:
                counts[definition.name] += places
                body.opset_imports[DOMAIN] = model.opset_imports[DOMAIN] = 1
                model.functions[function.identifier()] = function
    for body in bodies:
        if counts:
            body.sort()
    return counts


def _replace(body: ir.Function | ir.Graph, function: ir.Function, definition: Definition) -> int:
    root, places, gone = function.outputs[-1], 0, set[Any]()
    for node in list(body):
        if node in gone or len(node.outputs) != 1:
            continue
        for found in _values(root, node.outputs[0], Found({}, {}, ())):
            if _stands_alone(found, function, definition):
                gone.update(_call(body, node, function, found))
                places += 1
                break
    return places


def _call(body: ir.Function | ir.Graph, root: ir.Node, function: ir.Function, found: Found) -> list[ir.Node]:
    """Put the call in the place of the nodes, which are removed where nobody else reads them."""
    import onnx_ir as ir

    inputs = [found.values[value] for value in function.inputs]
    call = ir.node(function.name, inputs, found.attributes, domain=DOMAIN, num_outputs=len(function.outputs))
    body.insert_before(root, call)
    for pattern, new in zip(function.outputs, call.outputs, strict=True):
        old = found.values[pattern]
        new.shape, new.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        new.name, old.name = old.name, None
    gone = []
    for node in dict.fromkeys(found.nodes):  # Those that read come before those that are read.
        if not any(value.uses() for value in node.outputs):
            body.remove(node, safe=True)
            gone.append(node)
    return gone


def _stands_alone(found: Found, function: ir.Function, definition: Definition) -> bool:
    """Whether nobody reads what the call would no longer give, and all have the shapes that it takes."""
    given = {found.values[value] for value in function.outputs}
    for node in found.nodes:
        for value in node.outputs:
            if value in given or node.op_type in definition.shared:
                continue
            if value.is_graph_output() or any(use.node not in found.nodes for use in value.uses()):
                return False
    by_name = {str(value.name): found.values[value] for value in (*function.inputs, *function.outputs)}
    shapes = [shape for name in definition.alike if (shape := by_name[name].shape) is not None]
    # An input of a function has none.
    return not definition.alike or (bool(shapes) and all(len(shape) == 3 and shape == shapes[0] for shape in shapes))


def _values(pattern: ir.Value | None, value: ir.Value | None, found: Found) -> Iterator[Found]:
    """All ways in which a value may stand for one of the pattern."""
    if pattern is None or value is None:
        if pattern is value:
            yield found
        return
    if pattern in found.values:
        if found.values[pattern] is value:
            yield found
        return
    node, producer = pattern.producer(), value.producer()
    if node is None:
        yield found.bound(pattern, value)
        return
    is_cast = node.op_type in CASTS
    if producer is not None and not producer.domain:
        if is_cast and producer.op_type == "Cast":
            yield from _values(node.inputs[0], producer.inputs[0], _with(found.bound(pattern, value), producer))
        elif producer.op_type == node.op_type and (known := _attributes(node, producer, found)) is not None:
            yield from _inputs(node, producer, _with(known.bound(pattern, value), producer))
    if is_cast:
        yield from _values(node.inputs[0], value, found.bound(pattern, value))


def _with(found: Found, node: ir.Node) -> Found:
    return found._replace(nodes=(*found.nodes, node))


def _inputs(pattern: ir.Node, node: ir.Node, found: Found) -> Iterator[Found]:
    wanted, given = list(pattern.inputs), list(node.inputs)
    if len(given) == len(wanted) + 1 == 3 and _is_zero(given[-1], pattern.attributes):
        given.pop()
    if len(given) != len(wanted):
        return
    for order in permutations(given) if pattern.op_type in COMMUTATIVE else [tuple(given)]:
        ways = [found]
        for mine, its in zip(wanted, order, strict=True):
            ways = [more for way in ways for more in _values(mine, its, way)]
        yield from ways


def _is_zero(value: ir.Value | None, attributes: Any) -> bool:
    """Whether a zero point is a constant of zeros, of the type that the pattern rounds to."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "Constant" or "value" not in producer.attributes:
        return False
    tensor = producer.attributes["value"].as_tensor()
    wanted = attributes.get("output_dtype")
    return (wanted is None or tensor.dtype == wanted.as_int()) and not any(tensor.tobytes())


def _attributes(pattern: ir.Node, node: ir.Node, found: Found) -> Found | None:
    """With the attributes of a node, which are those of the pattern or stand for what it leaves open."""
    mine = {name: attribute for name, attribute in pattern.attributes.items() if name != "output_dtype"}
    extra = {name for name in node.attributes if name not in mine}
    if any(node.attributes[name].is_ref() or node.attributes[name].value != DEFAULTS.get(name) for name in extra):
        return None
    known = dict(found.attributes)
    for name, attribute in mine.items():
        given = node.attributes.get(name)
        value = DEFAULTS.get(name) if given is None else given.value
        if value is None or (given is not None and given.is_ref()):
            return None
        wanted = known.setdefault(str(attribute.ref_attr_name), value) if attribute.is_ref() else attribute.value
        if (tuple(wanted) if isinstance(wanted, list) else wanted) != value:
            return None
    return found._replace(attributes=known)
