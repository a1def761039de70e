"""Launch compiled kernels by CUDA's driver, whose bindings are imported at the first launch.

https://nvidia.github.io/cuda-python/cuda-bindings/latest/module/driver.html
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from zimgkit.plugins.manifest import FOLDER, KernelError, folder_of, read_manifest

C_TYPES = {"pointer": ctypes.c_void_p, "int32": ctypes.c_int32, "float32": ctypes.c_float}
SCRATCH = 2
"""Pointers to scratch memory that the compiler adds at the end; these kernels use none."""
STATIC_SHARED = 48 * 1024
"""Bytes of shared memory that a block may have unasked."""

_LOADING = threading.Lock()


def launch(
    operator: str, name: str, values: Mapping[str, float], *, device: int, capability: tuple[int, int], stream: int
) -> bool:
    """Queue a kernel on the current device.

    Args:
        operator: the folder of the operator.
        name: of the kernel, in its manifest.
        values: the arguments by name; a pointer is an address, 0 where it is not read.
        device: the number of the current device.
        capability: its compute capability.
        stream: the handle of a stream of it.

    Returns:
        False where there is no kernel for the device, or none for these arguments: nothing was queued then.

    Raises:
        KernelError: the kernel's file is broken, or CUDA refuses it.
    """
    kernel = read_manifest(operator).kernels.get(name)
    compiled = None if kernel is None else kernel.fitting(capability)
    if kernel is None or compiled is None or not kernel.takes(values):
        return False
    blocks = kernel.blocks(values)
    if 0 in blocks:
        return True
    with _LOADING:
        function = _load(folder_of(operator) / FOLDER / compiled.file, kernel.symbol, compiled.shared, device)
    arguments = [values[each.name] for each in kernel.parameters] + [0] * SCRATCH
    types = [C_TYPES[each.type] for each in kernel.parameters] + [ctypes.c_void_p] * SCRATCH
    block = (compiled.threads, 1, 1)
    _call("cuLaunchKernel", function, *blocks, *block, compiled.shared, stream, (tuple(arguments), tuple(types)), 0)
    return True


def is_available() -> bool:
    """Whether kernels can be launched at all: CUDA's bindings are installed, and there is a driver."""
    try:
        _call("cuInit", 0)
    except KernelError:
        return False
    return True


@cache
def _load(path: Path, symbol: str, shared: int, device: int) -> Any:
    try:
        library = _call("cuLibraryLoadData", path.read_bytes(), None, None, 0, None, None, 0)
        function = _call("cuLibraryGetKernel", library, symbol.encode())
    except (OSError, KernelError) as error:
        raise KernelError(f"{path} cannot be loaded ({error}): install zimgkit again") from None
    if shared > STATIC_SHARED:
        attribute = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _call("cuKernelSetAttribute", attribute, shared, function, device)
    return function


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise KernelError("CUDA's Python bindings are not installed") from None
    return driver


def _call(name: str, *arguments: Any) -> Any:
    """Call a function of the driver; what it gives beside its status."""
    driver = _driver()
    try:
        status, *results = getattr(driver, name)(*arguments)
    except RuntimeError as error:  # There is no driver.
        raise KernelError(f"{name} failed: {error}") from None
    if int(status):
        text = driver.cuGetErrorString(status)[1]
        raise KernelError(f"{name} failed: {text.decode() if text else f'status {int(status)}'}")
    return results[0] if results else None
