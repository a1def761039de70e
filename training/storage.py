"""Frozen weights in 8 bits: half the memory of bfloat16, and they are trained beside, not in.

A weight is stored as float8 e4m3 times a factor for each row, and multiplied out where it is used, in the forward pass
and again in the backward pass, so that never more than one is held as it was.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

MAX = torch.finfo(torch.float8_e4m3fn).max
IN_A_BLOCK = re.compile(r".+\.\d+\..+")
"""Names of what is in a list of blocks: nearly all weights. Around them, networks ask linears for their types."""


class _Product(torch.autograd.Function):
    """A linear that keeps its 8 bits for the backward pass, where autograd would keep what they were made of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor, factors: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(bits, factors)
        return nn.functional.linear(x, _weight(bits, factors, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        bits, factors = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ _weight(bits, factors, gradient.dtype), None, None, None


class Float8Linear(nn.Module):
    """A frozen linear in 8 bits."""

    bits: Tensor
    factors: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        factors = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / MAX
        # As bytes: not every library that moves tensors between processes knows the type.
        self.register_buffer("bits", (weight / factors).to(torch.float8_e4m3fn).view(torch.uint8))
        self.register_buffer("factors", factors)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight(self) -> Tensor:
        """(out, in), as it is multiplied with."""
        return _weight(self.bits, self.factors, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out: Tensor = _Product.apply(x, self.bits, self.factors, self.bias)
        return out


def store_in_float8(network: nn.Module) -> None:
    """Put the frozen linears of a network's blocks into 8 bits."""
    for name, module in list(network.named_modules()):
        if type(module) is nn.Linear and IN_A_BLOCK.fullmatch(name) and not module.weight.requires_grad:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, Float8Linear(module))


def _weight(bits: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    return (bits.view(torch.float8_e4m3fn).to(torch.float32) * factors).to(dtype)


def checkpoint_activations(network: Any, *, offload: bool) -> None:
    """Compute activations twice rather than keep them.

    Args:
        network: of diffusers.
        offload: keep what goes into each block in the host's memory meanwhile.
    """
    if not offload:
        network.enable_gradient_checkpointing()
        return

    def on_the_host(module: nn.Module, *arguments: Any) -> Any:
        with torch.autograd.graph.save_on_cpu():
            return torch.utils.checkpoint.checkpoint(module.__call__, *arguments, use_reentrant=False)

    network.enable_gradient_checkpointing(on_the_host)
