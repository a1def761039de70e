"""The modulation table: all that the timestep alone decides, computed once per schedule.

Of some networks a third of the weights do nothing but turn the timestep into shifts, scales and gates (adaLN: Peebles
and Xie 2023). They are streamed once, a linear at a time, and only their N x 12 x layers rows stay in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import BundleError
from zimgkit.engines.tensors import safetensors
from zimgkit.engines.tensors.dtypes import BY_NAME, float32_to_bfloat16, to_float32
from zimgkit.engines.tensors.safetensors import TensorInfo
from zimgkit.runtime.disk_cache import cached_array

COMPONENT = "modulation"
LAYOUT_VERSION = 1
"""Part of the cache's keys, to be raised when the rows change their order or their arithmetic."""

PIECE = 1 << 23
"""How many weights are held as float32 at a time."""


class ModulationLayout(NamedTuple):
    """What the linears of a family's modulation are called."""

    time_embedding: str
    """Two linears, ``linear_1`` and ``linear_2``, with a SiLU between and after them."""
    streams: tuple[str, str]
    """In each block ``transformer_blocks.N``: the modulation of the image's stream, and of the text's."""
    output: str
    """The one before the output's projection."""
    addition: str
    """A table whose first row is added to the time embedding, in checkpoints that have it."""


class ModulationTable:
    """The modulation of every step; ``table[step]`` is float32 (rows, dim), read when asked for.

    Rows 12 i ... 12 i + 5 are block i's shift, scale and gate of the image stream before attention, then before
    the MLP; rows 12 i + 6 ... 12 i + 11 are those of the text stream; the last two are the output's scale and shift.
    """

    def __init__(self, stored: NDArray[Any], precision: str) -> None:
        self._stored = stored
        self._precision = precision

    @property
    def shape(self) -> tuple[int, ...]:
        """(steps, 12 * layers + 2, dim)."""
        return self._stored.shape

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, step: int) -> NDArray[np.float32]:
        return to_float32(np.array(self._stored[step]), self._precision)


def modulation_table(
    bundle: Bundle,
    layout: ModulationLayout,
    sigmas: NDArray[np.float32],
    time_embedding: NDArray[np.float32],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ModulationTable:
    """The modulation of every step of a schedule: from the cache, or computed and stored there.

    Time stays float32. A reference that runs in bfloat16 rounds it first, which moves it by up to 0.2 %.

    Args:
        bundle: an open bundle with a component ``modulation``.
        layout: of its family.
        sigmas: float32 (N,), the noise level of each step, without the 0 at the end.
        time_embedding: float32 (N, 256), the sinusoids of each step's time.
        progress: called with how many linears are done and how many there are; not at all where the table was
            in the cache.

    Raises:
        BundleError: a tensor is missing or has another shape.
        UsageError: ``ZIMG_CACHE_LIMIT`` is not a number of bytes.
    """
    sigmas = np.ascontiguousarray(sigmas, "<f4")
    tensors = bundle.tensors(COMPONENT)
    precision = "bfloat16" if bundle.manifest.precision == "bfloat16" else "float32"
    layers = sum(name.endswith(f".{layout.streams[0]}.weight") for name in tensors)
    linears = [(f"transformer_blocks.{i}.{stream}", 6) for i in range(layers) for stream in layout.streams]
    linears.append((layout.output, 2))
    dim = _find(tensors, f"{layout.time_embedding}.linear_2.bias").shape[0]

    def fill(table: NDArray[Any]) -> None:
        # Once for all: to fill new memory takes as long as to widen the weights.
        wide = np.empty(max(PIECE, dim, time_embedding.shape[1]), np.float32)
        hidden = _linear(tensors, f"{layout.time_embedding}.linear_1", time_embedding, dim, wide)
        embedding = _linear(tensors, f"{layout.time_embedding}.linear_2", _silu(hidden), dim, wide)
        if addition := tensors.get(f"{layout.addition}.weight"):
            embedding += to_float32(safetensors.view(addition)[0], addition.dtype)
        signal = _silu(embedding)
        row = 0
        for done, (name, rows) in enumerate(linears, start=1):
            values = _linear(tensors, name, signal, rows * dim, wide).reshape(len(sigmas), rows, dim)
            table[:, row : row + rows] = float32_to_bfloat16(values) if precision == "bfloat16" else values
            row += rows
            if progress:
                progress(done, len(linears))
        bundle.check_unchanged(COMPONENT)  # Another bundle's table is not kept under this one's name.

    identity = f"{bundle.content_hash(COMPONENT)} {precision} {LAYOUT_VERSION} ".encode() + sigmas.tobytes()
    shape = (len(sigmas), 12 * layers + 2, dim)
    key = hashlib.sha256(identity).hexdigest()
    return ModulationTable(cached_array(COMPONENT, key, shape, BY_NAME[precision].storage, fill), precision)


def _silu(values: NDArray[np.float32]) -> NDArray[np.float32]:
    wide = values.astype(np.float64)
    with np.errstate(over="ignore"):  # far below zero the result is 0
        activated: NDArray[np.float32] = (wide / (1 + np.exp(-wide))).astype(np.float32)
    return activated


def _linear(
    tensors: Mapping[str, TensorInfo], name: str, values: NDArray[np.float32], out: int, wide: NDArray[np.float32]
) -> NDArray[np.float32]:
    """``values @ weight.T + bias``: (N, in) -> (N, out). As many rows of the weight as ``wide`` holds are float32."""
    weight, bias = _find(tensors, f"{name}.weight"), _find(tensors, f"{name}.bias")
    width = values.shape[1]
    if weight.shape != (out, width) or bias.shape != (out,):
        raise BundleError(
            f"{weight.file}: {name} has shapes {weight.shape} and {bias.shape} instead of {(out, width)} and {(out,)}",
            "build the bundle again",
        )
    stored = safetensors.view(weight)
    result = np.empty((len(values), out), np.float32)
    rows = max(1, len(wide) // width)
    for start in range(0, out, rows):
        piece = stored[start : start + rows]
        piece = to_float32(piece, weight.dtype, wide[: piece.size].reshape(piece.shape))
        np.matmul(values, piece.T, out=result[:, start : start + rows])
    if scale := tensors.get(f"{name}.weight.scale"):
        # Of each row of a weight in 8 bits.
        result *= to_float32(safetensors.view(scale), scale.dtype)
    result += to_float32(safetensors.view(bias), bias.dtype)
    return result


def _find(tensors: Mapping[str, TensorInfo], name: str) -> TensorInfo:
    try:
        return tensors[name]
    except KeyError:
        raise BundleError(f"the bundle's {COMPONENT} has no tensor {name}", "build the bundle again") from None
