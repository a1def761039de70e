"""Muon: a step is the momentum of a matrix, orthogonalized.

From "Muon: An optimizer for hidden layers" (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/). torch's
own multiplies in bfloat16, which processors without such instructions do slowly; and here matrices of one shape are
orthogonalized together, for those of small models are too small to fill a processor alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration: they bring singular values from nearly zero to about one in five rounds."""
ROUNDS = 5
MATCH = 0.2
"""Times the root of the longer side: the root mean square of a step of AdamW ("Muon is Scalable for LLM Training", Liu
et al., 2025, https://arxiv.org/abs/2502.16982), so both may have one learning rate."""


class Muon(torch.optim.Optimizer):
    """For the matrices of hidden layers, kernels of convolutions among them as (out, in times taps).

    What is no matrix, and what is first and last, wants another optimizer.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; the closure is not called."""
        for group in self.param_groups:
            by_shape: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(parameter.shape), parameter.device].append(parameter)
            for (shape, _), parameters in by_shape.items():
                lookahead = [self._momentum(parameter, group["momentum"]) for parameter in parameters]
                matrices = torch.stack(lookahead).flatten(2)
                steps = orthogonalize(matrices).reshape(-1, *shape)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(
                    parameters, list(steps), alpha=-group["lr"] * MATCH * math.sqrt(max(matrices.shape[1:]))
                )

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """Bring a parameter's momentum up to date; where it will be after the next such gradient (Nesterov)."""
        gradient = parameter.grad
        if gradient is None:
            raise RuntimeError("a parameter has no gradient")
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring all singular values near to one, between 0.7 and 1.2, and keep singular vectors.

    Args:
        matrices: (n, rows, columns).
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
