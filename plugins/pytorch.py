"""The operators in PyTorch: by a kernel where there is one for the device and the tensors, else by its own calls.

Nothing here was tried on a GPU. So a kernel is used only after it has agreed, on the very device, with what PyTorch's
own calls give.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zimgkit.plugins.launch import is_available, launch
from zimgkit.plugins.manifest import KernelError

OPERATORS = ("gate_norm_modulate", "qk_norm_rope", "quantized_linear")
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""Element type of a result -> the largest relative L2 error of a kernel; what has 8 bits may be the next number."""
ROUNDED_TOLERANCE = 3e-2


def queue(operator: str, kernel: str, device: torch.device, **arguments: Tensor | float | None) -> bool:
    """Queue a kernel on the current stream of a device.

    Args:
        operator: its folder.
        kernel: its name in the manifest.
        device: where the tensors are.
        arguments: what the kernel takes, by name; None stands for a tensor that it does not read.

    Returns:
        Whether there is a kernel for the device and these arguments.

    Raises:
        KernelError: its file is broken, or CUDA refuses it.
    """
    if device.type != "cuda":
        return False
    values = {
        name: each.data_ptr() if isinstance(each, Tensor) else 0 if each is None else each
        for name, each in arguments.items()
    }
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        capability, stream = torch.cuda.get_device_capability(index), torch.cuda.current_stream().cuda_stream
        return launch(operator, kernel, values, device=index, capability=capability, stream=stream)


def dtype_name(dtype: torch.dtype) -> str:
    """As kernels are named for it, such as ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def operators(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """The operators that have a kernel on a device, by the names of their functions.

    Each takes the inputs of the function as tensors and its attributes as keywords, and gives a tensor or a list of
    them. Each is an operator of PyTorch's own kind, which ``torch.compile`` leaves as it is.

    Args:
        device: any; only of CUDA there are some.
        dtype: what is computed in.

    Raises:
        torch.OutOfMemoryError: the device is too full to try them.
    """
    if device.type != "cuda" or not is_available():
        return {}
    agreeing = [module_of(operator) for operator in OPERATORS if _agrees(operator, device, dtype)]
    return {name: call for module in agreeing for name, call in module.CALLS.items()}


def module_of(operator: str) -> ModuleType:
    """What an operator is in PyTorch."""
    return importlib.import_module(f"zimgkit.plugins.{operator}.torch")


@cache
def _agrees(operator: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all kernels of an operator are there, and give what PyTorch's own calls give."""
    try:
        with torch.inference_mode():
            pairs: Iterable[tuple[Tensor | None, Tensor]] = module_of(operator).trials(device, dtype)
            return all(found is not None and agrees(found, expected) for found, expected in pairs)
    except KernelError:
        return False


def agrees(found: Tensor, expected: Tensor) -> bool:
    """Whether a kernel gives what is expected, but for rounding."""
    return error(found, expected) < TOLERANCE.get(expected.dtype, ROUNDED_TOLERANCE)


def error(found: Tensor, expected: Tensor) -> float:
    """The relative L2 error; infinite where something is not finite."""
    wide, true = found.double(), expected.double()
    relative = float((wide - true).norm() / true.norm().clamp_min(1e-30))
    return relative if relative == relative else float("inf")  # noqa: PLR0124 (NaN)
