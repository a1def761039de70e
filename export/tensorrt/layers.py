"""What a plan is made of: its layers, and which attentions became one fused kernel."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FUSED = "mha"
"""Part of the names of TensorRT's fused attention kernels, such as ``_gemm_mha_v2``."""


@dataclass(frozen=True)
class Layer:
    """One layer of a plan."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    """The ONNX nodes it computes, each as ``node | call (function)``."""


def from_log(lines: Iterable[str]) -> list[Layer]:
    """The layers that the compiler lists in its log."""
    layers = []
    for line in lines:
        if match := re.match(r"Name: (.*?), LayerType: (\w+)", line):
            layers.append(Layer(match[1], match[2], _nodes(line.rpartition("Metadata: ")[2])))
    return layers


def from_inspector(text: str) -> list[Layer]:
    """The layers in what ``EngineInspector.get_engine_information`` gives as JSON."""
    entries = json.loads(text).get("Layers", [])
    return [
        Layer(str(e.get("Name")), str(e.get("LayerType")), _nodes(str(e.get("Metadata", ""))))
        for e in entries
        if isinstance(e, dict)
    ]


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


def _call_of(node: str) -> str:
    """The call that a node of a function stands in."""
    return node.partition(" | ")[2].rpartition(" (")[0]


def kinds(layers: Sequence[Layer]) -> dict[str, int]:
    """How many layers there are of each kind, most frequent first."""
    return dict(Counter(layer.kind for layer in layers).most_common())
