"""Attention as ONNX Runtime computes it on CPUs without keeping the scores.

Its kernel of the standard ``Attention`` holds all scores at once, which grow with the square of the tokens; that of its
own ``MultiHeadAttention`` goes through them in blocks, as FlashAttention does (https://arxiv.org/abs/2205.14135), and
so does ``GroupQueryAttention``, which is causal. Where there is a mask neither does, and so the scores of some heads at
a time are held.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MultiHeadAttention
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from zimgkit.export.graphs.nodes import CONTRIB, constant, insert, take_over

SWAP = [0, 2, 1, 3]
"""(batch, heads, tokens, head_dim) <-> (batch, tokens, heads, head_dim)."""
MASKED_HEADS = 8
"""The most heads whose scores are held at once where there is a mask."""


class FlashAttention(ir.passes.InPlacePass):
    """Replace every ``Attention`` whose heads all have keys of their own, or that is causal."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the model's functions in place."""
        changed = False
        for function in model.functions.values():
            for node in [node for node in function if _is_plain(node)]:
                changed = True
                if len(node.inputs) == 4:
                    _split(function, node)
                    continue
                _replace_causal(function, node) if _is_causal(node) else _replace(function, node)
                function.opset_imports[CONTRIB] = 1
                model.opset_imports[CONTRIB] = 1
        if changed:
            passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=changed)


def _is_plain(node: ir.Node) -> bool:
    if node.domain or node.op_type != "Attention" or len(node.inputs) not in (3, 4) or len(node.outputs) != 1:
        return False
    if "softcap" in node.attributes and node.attributes["softcap"].value:
        return False
    heads, *others = (_heads(value) for value in node.inputs[:3])
    if _is_causal(node):
        # Some heads may have keys in common.
        return len(node.inputs) == 3 and heads is not None and None not in others
    if heads is None or {heads} != set(others):
        return False
    # Our masks are the same for all heads; the shape of one that comes from outside is not known here.
    return len(node.inputs) == 3 or (heads > MASKED_HEADS and _is_long(node.inputs[1]))


def _is_causal(node: ir.Node) -> bool:
    return "is_causal" in node.attributes and bool(node.attributes["is_causal"].value)


def _is_long(value: ir.Value | None) -> bool:
    """Whether the tokens of (batch, heads, tokens, head_dim) may be any number: those of a window are few."""
    return value is not None and value.shape is not None and not isinstance(value.shape[2], int)


def _heads(value: ir.Value | None) -> int | None:
    """The heads of (batch, heads, tokens, head_dim), where that is the shape and they are fixed."""
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    heads = value.shape[1]
    return heads if isinstance(heads, int) else None


def _split(function: ir.Function, node: ir.Node) -> None:
    """Some heads after the others."""
    *rows, mask = node.inputs
    count = -(-(_heads(rows[0]) or 1) // MASKED_HEADS)
    groups = [ir.node("Split", [value], {"axis": 1, "num_outputs": count}, num_outputs=count) for value in rows]
    function.insert_before(node, groups)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    found = [
        insert(function, node, "Attention", [*some, mask], attributes)
        for some in zip(*(group.outputs for group in groups), strict=True)
    ]
    take_over(node.outputs[0], insert(function, node, "Concat", found, {"axis": 1}))


def _replace(function: ir.Function, node: ir.Node) -> None:
    heads = _heads(node.inputs[0])
    inputs = [_rows(function, node, value, heads) for value in node.inputs]
    attributes: dict[str, Any] = {"num_heads": heads} | _scale(node)
    _give(function, node, insert(function, node, "MultiHeadAttention", inputs, attributes, CONTRIB))


def _replace_causal(function: ir.Function, node: ir.Node) -> None:
    """Tokens of the past are an empty cache: all tokens of the batch are new."""
    counts = [_heads(value) for value in node.inputs]
    rows = [_rows(function, node, value, heads) for value, heads in zip(node.inputs, counts, strict=True)]
    batch = insert(function, node, "Shape", [rows[0]], {"start": 0, "end": 1})
    tokens = insert(function, node, "Shape", [rows[0]], {"start": 1, "end": 2})
    tokens = insert(function, node, "Cast", [tokens], {"to": ir.DataType.INT32})
    last = insert(function, node, "Sub", [tokens, constant(function, node, np.array([1], np.int32))])
    last = insert(function, node, "Expand", [last, batch])
    attributes = {"num_heads": counts[0], "kv_num_heads": counts[1]} | _scale(node)
    # It hands out its cache as well.
    made = ir.node("GroupQueryAttention", [*rows, None, None, last, tokens], attributes, domain=CONTRIB, num_outputs=3)
    function.insert_before(node, made)
    _give(function, node, made.outputs[0])


def _scale(node: ir.Node) -> dict[str, Any]:
    return {"scale": node.attributes["scale"].as_float()} if "scale" in node.attributes else {}


def _give(function: ir.Function, node: ir.Node, out: ir.Value) -> None:
    """Let (batch, tokens, heads * head_dim) stand for what a node gave, turned back where blocks do not turn it."""
    heads, old = _heads(node.inputs[0]), node.outputs[0]
    turned = _only_user(old, "Transpose")
    flat = _only_user(turned.outputs[0], "Reshape") if turned is not None and _turns(turned) else None
    if flat is not None:
        old = flat.outputs[0]
    else:
        out = insert(function, node, "Reshape", [out, constant(function, node, np.array([0, 0, heads, -1]))])
        out = insert(function, node, "Transpose", [out], {"perm": SWAP})
    take_over(old, out)


def _rows(function: ir.Function, node: ir.Node, value: ir.Value | None, heads: int | None) -> ir.Value:
    """(batch, heads, tokens, head_dim) -> (batch, tokens, heads * head_dim); rotated after that where it is rotated."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "RotaryEmbedding" and "num_heads" not in producer.attributes:
        source, *tables = producer.inputs
        flat = _rows(function, node, source, heads)
        attributes = {name: attribute.value for name, attribute in producer.attributes.items()} | {"num_heads": heads}
        return insert(function, node, "RotaryEmbedding", [flat, *tables], attributes)
    if producer is not None and _turns(producer):
        turned = producer.inputs[0]
    else:
        turned = insert(function, node, "Transpose", [value], {"perm": SWAP})
    return insert(function, node, "Reshape", [turned, constant(function, node, np.array([0, 0, -1]))])


def _turns(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == SWAP


def _only_user(value: ir.Value, operator: str) -> ir.Node | None:
    users = [use.node for use in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == operator else None
