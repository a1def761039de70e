"""Attention as ONNX Runtime computes it on CPUs without keeping the scores.

Its kernel of the standard ``Attention`` holds all scores at once, which grow with the square of the tokens; that of its
own ``MultiHeadAttention`` goes through them in blocks, as FlashAttention does (https://arxiv.org/abs/2205.14135). Where
there is a mask it does not, and so the scores of some heads at a time are held.

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
    """Replace every ``Attention`` that is not causal, and whose heads all have keys of their own."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the model's functions in place."""
        changed = False
        for function in model.functions.values():
            for node in [node for node in function if _is_plain(node)]:
                changed = True
                if len(node.inputs) == 4:
                    _split(function, node)
                    continue
                _replace(function, node)
                function.opset_imports[CONTRIB] = 1
                model.opset_imports[CONTRIB] = 1
        if changed:
            passes.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=changed)


def _is_plain(node: ir.Node) -> bool:
    if node.domain or node.op_type != "Attention" or len(node.inputs) not in (3, 4) or len(node.outputs) != 1:
        return False
    if any(node.attributes[name].value for name in ("is_causal", "softcap") if name in node.attributes):
        return False
    heads, *others = {_heads(value) for value in node.inputs[:3]}
    if heads is None or others:
        return False
    # Our masks are the same for all heads; the shape of one that comes from outside is not known here.
    return len(node.inputs) == 3 or (heads > MASKED_HEADS and _is_long(node.inputs[1]))


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
    attributes: dict[str, Any] = {"num_heads": heads}
    if "scale" in node.attributes:
        attributes["scale"] = node.attributes["scale"].as_float()
    out = insert(function, node, "MultiHeadAttention", inputs, attributes, CONTRIB)
    # What comes out is as the blocks turn it; where they do not, it is turned back.
    old = node.outputs[0]
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
