"""Runs every trial of an operator with its kernels interpreted on the CPU; a program of its own."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from zimgkit.plugins.pytorch import error, module_of

SIZES = {
    "gate_norm_modulate": [(3, 48), (1, 3840)],
    "qk_norm_rope": [(33, 3, 16), (2, 9, 128)],
    "quantized_linear": [(33, 192, 48), (3, 256, 160)],
}


DENSE = [(1, 5, 0, 9, 16), (2, 4, 0, 3, 128), (1, 3, 2, 3, 32), (3, 2, 5, 9, 16), (2, 3, 1, 8, 128)]
"""Batch, tokens, those of a context, heads, width."""
DENSE_NAMES = {False: "dense_qk_norm_rope", True: "joint_dense_qk_norm_rope"}


def interpreted(operator: str, kernel: str, device: torch.device, **arguments: Any) -> bool:
    """Stands for :func:`zimgkit.plugins.pytorch.queue`."""
    name, _, dtype = kernel.rpartition(".")
    kernels = importlib.import_module(f"zimgkit.plugins.{operator}.triton").KERNELS
    (found,) = (each for each in kernels if name == (each.name or each.function.__name__))
    assert set(arguments) == set(found.signature(dtype)), "the kernel has other parameters"
    grid = tuple(-(-arguments[name] // each) for name, each in found.grid)
    values = {
        name: each.view(torch.int8) if isinstance(each, torch.Tensor) and each.dtype.itemsize == 1 else each
        for name, each in arguments.items()
    }
    values = {name: int(each) if isinstance(each, bool) else each for name, each in values.items()}
    found.function[(*grid, *[1] * (3 - len(grid)))](**values, **found.constants)
    return True


def portable() -> list[float]:
    """Relative errors of the portable kernels, whose arguments are inputs, integers and the output, all dense."""
    from zimgkit.plugins.qk_norm_rope.torch import composed
    from zimgkit.plugins.qk_norm_rope.triton import KERNELS

    errors = []
    for seed, (batch, tokens, context, heads, width) in enumerate(DENSE):
        torch.manual_seed(seed)
        streams = [(torch.randn(batch, n, heads, width), torch.randn(width)) for n in (context, tokens) if n]
        angles = torch.randn(batch, tokens + context, width // 2)
        cos, sin, epsilon = angles.cos(), angles.sin(), torch.tensor(1e-2)
        y = torch.zeros(batch, heads, tokens + context, width)
        (kernel,) = (each for each in KERNELS if each.function.__name__ == DENSE_NAMES[bool(context)])
        sizes = {"tokens": tokens + context, "batch": batch, "heads": heads}
        integers = [*([context] if context else []), *sizes.values(), width, epsilon.view(torch.int32).item()]
        grid = tuple(-(-sizes[name] // each) for name, each in kernel.grid)
        inputs = [tensor for stream in streams for tensor in stream]
        kernel.function[grid](*inputs, cos, sin, *integers, y, **kernel.constants)
        errors.append(error(y, composed(streams, cos, sin, float(epsilon)).contiguous()))
    return errors


def main(operator: str) -> None:
    """Print the element types and relative errors of the trials, as JSON; bfloat16 products cannot be interpreted."""
    if operator == "portable":
        print(json.dumps(portable()))
        return
    module = module_of(operator)
    module.queue = interpreted
    trials = module.trials(torch.device("cpu"), torch.float32, SIZES[operator])
    print(json.dumps([(str(expected.dtype), error(found, expected)) for found, expected in trials]))


if __name__ == "__main__":
    main(*sys.argv[1:])
