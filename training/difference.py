"""What training changed in a model that comes with zimgkit, in eight bits a weight.

Why the difference: it is smaller than the weights are, so rounded to as few bits it costs less.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import CheckpointError
from zimgkit.engines.files import replacing
from zimgkit.engines.tensors.dtypes import bfloat16_to_float32
from zimgkit.engines.tensors.safetensors import read_header, view, write
from zimgkit.runtime.demo_models.assembled import SCALE


def write_difference(path: Path, before: Path, after: Path) -> None:
    """Write :data:`~zimgkit.runtime.demo_models.assembled.DIFFERENCE`.

    Args:
        path: the file; it is overwritten.
        before: safetensors, bfloat16.
        after: the same tensors, trained.

    Raises:
        CheckpointError: these are not the same tensors.
    """
    old, new = read_header(before), read_header(after)
    kinds = [{name: (info.dtype, info.shape) for name, info in header.items()} for header in (old, new)]
    if kinds[0] != kinds[1] or any(info.dtype != "bfloat16" for info in old.values()):
        raise CheckpointError(f"{after} has not the tensors of {before}, in bfloat16", "train on from that one")
    found: dict[str, NDArray[Any]] = {}
    for name, info in new.items():
        values = view(info)
        if np.array_equal(values, view(old[name])):
            continue
        found[name] = values
        if len(info.shape) == 2:
            change = bfloat16_to_float32(values) - bfloat16_to_float32(view(old[name]))
            found[name], found[name + SCALE] = rounded(change)
    dtypes = {np.dtype("i1"): "int8", np.dtype("u2"): "bfloat16", np.dtype("f4"): "float32"}
    tensors = {name: (dtypes[value.dtype], value.shape) for name, value in found.items()}
    with replacing(path) as part:
        write(part, tensors, {name: [value] for name, value in found.items()})


def rounded(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round a matrix (rows, columns) to numbers from -127 to 127 with a scale for each row, whose largest is 127.

    Returns:
        int8 (rows, columns) and float32 (rows,).
    """
    scales = np.maximum(np.abs(values).max(1), np.float32(1e-12)) / np.float32(127)
    return np.rint(values / scales[:, None]).astype(np.int8), scales
