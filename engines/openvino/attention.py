"""Attention of one wide head, as VAEs have it: some queries at a time, in plain products.

OpenVINO 2026.4 makes one operator of attention, for heads of 64 or 128 numbers. With a head of 512 and many tokens its
products are up to three times as slow as one by one; and one by one, all queries at once would take memory quadratic in
the tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from zimgkit.engines.openvino.api import load

WIDE = 256
"""Numbers of a head from which it is wide."""
QUERIES = 1024
"""At a time, at most. For each time keys and values are packed anew, which is to be little beside the products."""


def attend_in_parts(model: Any) -> int:
    """Put a loop over queries in the place of each attention that has one wide head and no mask.

    Results differ by the order of sums.

    Args:
        model: an ``openvino.Model``; it is changed.

    Returns:
        How many there were.
    """
    found = [node for node in model.get_ordered_ops() if _is_wide(node)]
    for node in found:
        query, key, value = (node.input(index).get_source_output() for index in range(3))
        parts = _in_parts(query, key, value)
        parts.set_friendly_name(node.get_friendly_name())
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(parts.output(0))
    return len(found)


def _is_wide(node: Any) -> bool:
    if node.get_type_name() != "ScaledDotProductAttention" or node.get_attributes()["causal"]:
        return False
    shapes = [node.input(index).get_partial_shape() for index in range(node.get_input_size())]
    # A number that is added to all scores changes nothing.
    without_mask = len(shapes) == 3 or (len(shapes) == 4 and shapes[3].rank.is_static and len(shapes[3]) == 0)
    return without_mask and all(_has_a_wide_head(shape) for shape in shapes[:3])


def _has_a_wide_head(shape: Any) -> bool:
    """Whether it is (batch, 1, tokens, head_dim)."""
    if shape.rank.is_dynamic or len(shape) != 4 or shape[1].is_dynamic or shape[3].is_dynamic:
        return False
    return bool(shape[1].get_length() == 1 and shape[3].get_length() >= WIDE)


def _in_parts(query: Any, key: Any, value: Any) -> Any:
    """Attention over equal parts of the queries, filled up with zeros.

    Args:
        query: (batch, 1, tokens, head_dim).
        key: likewise.
        value: likewise.

    Returns:
        A node of the shape of ``value``, with the tokens of ``query``.
    """
    opset = load().opset13
    zero, one = _integers(0), _integers(1)
    shape = opset.shape_of(query)
    batch, tokens, head_dim = (opset.gather(shape, _integers(axis), zero) for axis in (0, 2, 3))
    parts = opset.divide(opset.add(tokens, _integers(QUERIES - 1)), _integers(QUERIES))
    length = opset.divide(opset.subtract(opset.add(tokens, parts), one), parts)
    missing = opset.subtract(opset.multiply(parts, length), tokens)
    ends = opset.concat([zero, zero, missing, zero], 0)
    filling = opset.convert_like(opset.constant(np.float32(0)), query)
    filled = opset.pad(query, _integers(0, 0, 0, 0), ends, "constant", filling)
    split = opset.reshape(filled, opset.concat([batch, parts, length, head_dim], 0), False)
    attended = _loop(split, key, value, opset.squeeze(parts, zero))
    whole = opset.reshape(attended, _integers(0, 1, -1, value.get_partial_shape()[3].get_length()), True)
    return opset.slice(whole, zero, tokens, one, _integers(2))


def _loop(queries: Any, key: Any, value: Any, parts: Any) -> Any:
    """The attention of each part of ``queries``, (batch, parts, length, head_dim); in the same shape."""
    openvino = load()
    opset = openvino.opset13
    query, keys, values = (
        opset.parameter(each.get_partial_shape(), each.get_element_type()) for each in (key, key, value)
    )
    scale = opset.constant(np.float32(key.get_partial_shape()[3].get_length() ** -0.5))
    scores = opset.matmul(query, keys, False, True)
    scores = opset.multiply(scores, opset.convert_like(scale, scores))
    # As a matrix, or they are made one operator again.
    tokens = opset.gather(opset.shape_of(keys), _integers(2), _integers(0))
    weights = opset.softmax(opset.reshape(scores, opset.concat([_integers(-1), tokens], 0), False), -1)
    given = opset.matmul(opset.reshape(weights, opset.shape_of(scores), False), values, False, False)

    goes_on = opset.constant(np.array([True]))
    loop = opset.loop(parts, goes_on)
    loop.set_function(openvino.Model([goes_on, given], [query, keys, values]))
    loop.set_special_body_ports([-1, 0])
    loop.set_sliced_input(query, queries.output(0), 0, 1, 1, -1, 1)
    loop.set_invariant_input(keys, key)
    loop.set_invariant_input(values, value)
    return loop.get_concatenated_slices(given.output(0), 0, 1, 1, -1, 1)


def _integers(*values: int) -> Any:
    return load().opset13.constant(np.array(values, np.int64))
