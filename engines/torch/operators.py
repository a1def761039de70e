"""The operators of ``plugins/`` that have kernels on a device: a graph is rewritten to call them when it is opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from zimgkit.plugins.gate_norm_modulate import definition as gate_norm_modulate
from zimgkit.plugins.matching import rewrite
from zimgkit.plugins.pytorch import operators
from zimgkit.plugins.qk_norm_rope import definition as qk_norm_rope
from zimgkit.plugins.quantized_linear import definition as quantized_linear

if TYPE_CHECKING:
    import onnx_ir as ir

DEFINITIONS = (*qk_norm_rope.DEFINITIONS, *gate_norm_modulate.DEFINITIONS, *quantized_linear.DEFINITIONS)
"""What is looked for first comes first."""


def use_kernels(model: ir.Model, device: torch.device, compute: str) -> dict[str, Callable[..., Any]]:
    """Rewrite a model for the kernels of a device.

    Args:
        model: it is changed, where there are kernels.
        device: where it will run.
        compute: the element type that it computes in; there are no kernels for graphs of other kinds.

    Returns:
        The functions of the model that are not to be inlined -> what computes them.
    """
    dtype = getattr(torch, compute, None)
    found = {} if dtype is None else operators(device, dtype)
    if found:
        rewrite(model, [definition for definition in DEFINITIONS if definition.name in found])
    return found
