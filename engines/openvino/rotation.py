"""Rotary embeddings as OpenVINO's kernel computes them: it turns the halves of a head, and not adjacent pairs.

OpenVINO 2026.4 writes a rotation of pairs as one of halves between two transposes, each of which takes longer than it.
A score is a sum over a head's numbers: where queries and keys go to attention alone, both may stay in the order of
halves, and what is transposed before rotating can take the place of the transpose that splits the heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

SPLIT = (0, 0, 0, -1, 2)
"""Heads to pairs: (batch, tokens, heads, head_dim) -> (batch, tokens, heads, head_dim / 2, 2)."""
ORDER = (0, 2, 1, 4, 3)
"""To (batch, heads, tokens, 2, head_dim / 2)."""
JOIN = (0, 0, 0, -1)
"""To (batch, heads, tokens, head_dim)."""


class Rotation(NamedTuple):
    """Two nodes on the way of queries or keys to attention."""

    transpose: Any
    """(batch, tokens, heads, head_dim) to (batch, heads, tokens, head_dim)."""
    embedding: Any
    """Turns adjacent pairs of that."""


def rotate_halves(model: Any) -> None:
    """Let queries and keys of attention be rotated as halves, where both are rotated as pairs and nothing else sees it.

    What attention gives is the same, but for the order of its sums.

    Args:
        model: an ONNX model without functions; changed.
    """
    from onnx.helper import make_node
    from onnx.numpy_helper import from_array

    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    found: dict[str, Rotation] = {}
    for node in graph.node:
        if node.op_type == "Attention":
            query, key = (_rotation(name, makers, readers) for name in node.input[:2])
            if query and key:
                found |= {each.transpose.output[0]: each for each in (query, key)}
    if not found:
        return
    shapes = {"rotation.split": SPLIT, "rotation.join": JOIN}
    graph.initializer.extend(from_array(np.array(shape, np.int64), name) for name, shape in shapes.items())
    nodes = []
    for node in graph.node:
        if not (node.op_type == "Transpose" and node.output[0] in found):
            nodes.append(node)
            continue
        (output,) = node.output
        pairs, halves = f"{output}.pairs", f"{output}.halves"
        nodes += [
            make_node("Reshape", [node.input[0], "rotation.split"], [pairs], pairs),
            make_node("Transpose", [pairs], [halves], halves, perm=ORDER),
            make_node("Reshape", [halves, "rotation.join"], [output], node.name),
        ]
    for rotation in found.values():
        next(each for each in rotation.embedding.attribute if each.name == "interleaved").i = 0
    del graph.node[:]
    graph.node.extend(nodes)


def _rotation(name: str, makers: Mapping[str, Any], readers: Mapping[str, int]) -> Rotation | None:
    """How a value is rotated, whole and as pairs, between other element types or not; None where it is not."""
    way = []
    while readers[name] == 1 and (node := makers.get(name)):
        if node.op_type != "Cast":
            way.append(node)
        if len(way) == 2:
            break
        name = node.input[0]
    if [node.op_type for node in way] != ["RotaryEmbedding", "Transpose"]:
        return None
    embedding, transpose = way
    options, (order, *_) = _attributes(embedding), [*_attributes(transpose).values(), None]
    plain = len(embedding.input) == 3 and set(options) <= {"interleaved"} and options.get("interleaved") == 1
    return Rotation(transpose, embedding) if plain and order == [0, 2, 1, 3] else None


def _attributes(node: Any) -> dict[str, Any]:
    from onnx.helper import get_attribute_value

    return {each.name: get_attribute_value(each) for each in node.attribute}
