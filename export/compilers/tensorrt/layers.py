"""What a plan is made of: its layers, which attentions became one fused kernel, what is multiplied in 8 bits."""

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
"""What TensorRT calls layers that multiply matrices."""
EIGHT_BITS = (("Int8",), ("FP8",))
"""What it calls the types of the first input of those that do it in 8 bits."""


@dataclass(frozen=True)
class Layer:
    """One layer of a plan."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    """The ONNX nodes it computes, each as ``node | call (function)``."""
    inputs: tuple[str, ...] = ()
    """The element types of what it reads, constants aside, as the compiler calls them."""


def from_log(lines: Iterable[str]) -> list[Layer]:
    """The layers that the compiler lists in its log."""
    layers = []
    for line in lines:
        if match := re.match(r"Name: (.*?), LayerType: (\w+)", line):
            read = re.search(r", Inputs: \[(.*?)\], (?:Constants|Outputs): \[", line)
            types = re.findall(r"Datatype: (\w+)", read[1]) if read else []
            layers.append(Layer(match[1], match[2], _nodes(line.rpartition("Metadata: ")[2]), tuple(types)))
    return layers


def from_inspector(text: str) -> list[Layer]:
    """The layers in what ``EngineInspector.get_engine_information`` gives as JSON."""
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
    """The element type of a tensor in the inspector's JSON, which has it in words: ``Row major linear Int8 format``."""
    words = str(tensor.get("Datatype") or tensor.get("Format/Datatype")) if isinstance(tensor, dict) else ""
    found = re.search(r"\b(?:Int8|FP8|BFloat16|Half|Float|Int64|Int32|Bool)\b", words)
    return found[0] if found else words


def _nodes(metadata: str) -> tuple[str, ...]:
    """Split ``[ONNX Layer: node | call (function)]…``, in which nodes of functions are followed by where they are."""
    return tuple(re.findall(r"\[ONNX Layer: ([^\]]+)\]", metadata))


def unfused(layers: Sequence[Layer], attentions: Sequence[str], times: int = 1) -> tuple[str, ...]:
    """Which attentions are not one fused kernel.

    Args:
        layers: of the plan.
        attentions: where attention is computed, by the call of its block.
        times: how often the plan holds each block, which is once for each profile that was compiled apart.
    """
    counts = Counter(
        call for layer in layers if FUSED in layer.name for call in dict.fromkeys(map(_call_of, layer.nodes))
    )
    return tuple(call for call in attentions if counts[call] < times)


def widened(layers: Sequence[Layer], products: Sequence[str], times: int = 1) -> tuple[str, ...]:
    """Which multiplications of quantized numbers are not computed in 8 bits.

    Args:
        layers: of the plan.
        products: the nodes, each as ``node | call``.
        times: how often the plan holds each block.
    """
    counts = Counter(
        node.rpartition(" (")[0]
        for layer in layers
        if layer.kind == MULTIPLICATION and layer.inputs[:1] in EIGHT_BITS
        for node in dict.fromkeys(layer.nodes)
    )
    return tuple(product for product in products if counts[product] < times)


def _call_of(node: str) -> str:
    """The call that a node of a function stands in."""
    return node.partition(" | ")[2].rpartition(" (")[0]


def kinds(layers: Sequence[Layer]) -> dict[str, int]:
    """How many layers there are of each kind, most frequent first."""
    return dict(Counter(layer.kind for layer in layers).most_common())
