"""Initializers that are byte ranges of weight files."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from zimgkit.engines.tensors.dtypes import BY_NAME
from zimgkit.engines.tensors.safetensors import TensorInfo


def external(
    info: TensorInfo, folder: Path, dtype: ir.DataType | None = None, shape: ir.Shape | None = None
) -> ir.ExternalTensor:
    """A stored tensor as the value of an initializer.

    Args:
        info: where it lies.
        folder: the graph's; the tensor's file lies in it, at any depth.
        dtype: the element type the graph sees, by default the stored one; numbers of four bits are stored as bytes.
        shape: likewise.
    """
    return ir.ExternalTensor(
        info.file.relative_to(folder).as_posix(),
        info.offset,
        info.nbytes,
        dtype or ir.DataType(BY_NAME[info.dtype].onnx),
        shape=shape or ir.Shape(info.shape),
        name=info.name,
        base_dir=folder,
    )
