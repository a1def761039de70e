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


def main(operator: str) -> None:
    """Print the element types and relative errors of the trials, as JSON; bfloat16 products cannot be interpreted."""
    module = module_of(operator)
    module.queue = interpreted
    trials = module.trials(torch.device("cpu"), torch.float32, SIZES[operator])
    print(json.dumps([(str(expected.dtype), error(found, expected)) for found, expected in trials]))


if __name__ == "__main__":
    main(*sys.argv[1:])
