"""Gated feed-forwards whose products stay apart, where OpenVINO cannot run them as one.

On CPUs with AMX, OpenVINO 2026.4 makes one operator of the three products of a gated feed-forward in bfloat16, and
divides its threads between two of them: with one thread the process ends in a division by zero.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from zimgkit.engines.cpu import cpu_flags
from zimgkit.engines.openvino.api import load

LOWEST = np.finfo(np.float32).min


def ends_in_a_crash(config: Mapping[str, str]) -> bool:
    """Whether a model of this configuration has one thread alone, on a CPU with AMX."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return "amx_bf16" in cpu_flags() and (count == 1 or config.get("INFERENCE_NUM_THREADS") == "1")


def keep_apart(model: Any) -> int:
    """Put an operator that changes no number before the last product of each gated feed-forward.

    Args:
        model: an ``openvino.Model``; it is changed.

    Returns:
        How many there were.
    """
    opset = load().opset13
    found = 0
    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul":
            continue
        gated = product.input(0).get_source_output()
        makers = [each.get_source_output().get_node() for each in gated.get_node().inputs()]
        # A gate times what it lets through: neither is a constant.
        if gated.get_node().get_type_name() == "Multiply" and not any(m.get_type_name() == "Constant" for m in makers):
            lowest = opset.convert_like(opset.constant(LOWEST), gated)
            product.input(0).replace_source_output(opset.maximum(gated, lowest).output(0))
            found += 1
    return found
