"""The layers of a plan, which attentions are one fused kernel, and which products are computed in 8 bits."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

FUSED = "mha"
"""Part of the names of TensorRT's fused attention kernels, such as ``_gemm_mha_v2``."""

MULTIPLICATION = "gemm"
"""TensorRT's kind of layers that multiply matrices."""
EIGHT_BITS = (("Int8",), ("FP8",))
"""The type of the first input of those that compute in 8 bits, in TensorRT's words."""


@dataclass(frozen=True)
class Layer:
    """One layer of a plan."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    """The ONNX nodes it computes, each as ``node | call (function)``."""
    inputs: tuple[str, ...] = ()
    """The element types of its inputs, without constants, in the compiler's words."""


def from_log(lines: Iterable[str]) -> list[Layer]:
    """Parse the layers that the compiler lists in its log."""
    layers = []
    for line in lines:
        if match := re.match(r"Name: (.*?), LayerType: (\w+)", line):
            read = re.search(r", Inputs: \[(.*?)\], (?:Constants|Outputs): \[", line)
            types = re.findall(r"Datatype: (\w+)", read[1]) if read else []
            layers.append(Layer(match[1], match[2], _nodes(line.rpartition("Metadata: ")[2]), tuple(types)))
    return layers


def from_inspector(text: str) -> list[Layer]:
    """Parse the layers in the JSON of ``EngineInspector.get_engine_information``."""
    entries = json.loads(text).get("Layers", [])
    return [
        Layer(
            str(e.get("Name")),
            str(e.get("LayerType")),
            _nodes(str(e.get("Metadata", ""))),
            tuple(_type_of(tensor) for tensor in e.get("Inputs", ())),
        )
        for e in entries
        if isinstance(e, dict)
    ]


def _type_of(tensor: Any) -> str:
    """The element type of a tensor in the inspector's JSON, such as ``Int8`` of ``Row major linear Int8 format``."""
    words = str(tensor.get("Datatype") or tensor.get("Format/Datatype")) if isinstance(tensor, dict) else ""
    found = re.search(r"\b(?:Int8|FP8|BFloat16|Half|Float|Int64|Int32|Bool)\b", words)
    return found[0] if found else words


def _nodes(metadata: str) -> tuple[str, ...]:
    """Split ``[ONNX Layer: node | call (function)]…``; a function's node is followed by the call and function."""
    return tuple(re.findall(r"\[ONNX Layer: ([^\]]+)\]", metadata))


def unfused(layers: Sequence[Layer], attentions: Sequence[str], times: int = 1) -> tuple[str, ...]:
    """Find the attentions that are not one fused kernel.

    Args:
        layers: of the plan.
        attentions: the names of the calls in which attention is computed.
        times: how many copies of each block the plan has: one for each profile that was compiled separately.
    """
    counts = Counter(
        call for layer in layers if FUSED in layer.name for call in dict.fromkeys(map(_call_of, layer.nodes))
    )
    return tuple(call for call in attentions if counts[call] < times)


def not_in_8_bits(layers: Sequence[Layer], products: Sequence[str], times: int = 1) -> tuple[str, ...]:
    """Find the matrix products of quantized inputs that are not computed in 8 bits.

    Args:
        layers: of the plan.
        products: the nodes of the products, each as ``node | call``.
        times: how many copies of each block the plan has.
    """
    counts = Counter(
        node.rpartition(" (")[0]
        for layer in layers
        if layer.kind == MULTIPLICATION and layer.inputs[:1] in EIGHT_BITS
        for node in dict.fromkeys(layer.nodes)
    )
    return tuple(product for product in products if counts[product] < times)


def _call_of(node: str) -> str:
    """The call in ``node | call (function)``."""
    return node.partition(" | ")[2].rpartition(" (")[0]


def kinds(layers: Sequence[Layer]) -> dict[str, int]:
    """Count the layers of each kind, most frequent first."""
    return dict(Counter(layer.kind for layer in layers).most_common())
