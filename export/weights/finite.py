"""NaN and infinities in stored tensors, counted where bytes pass anyway: while they are written, or hashed.

In every float format here a number whose exponent is all ones is NaN or infinite. As integers those are the largest of
each sign, so that the maxima of a piece, taken as signed and as unsigned integers, tell whether it holds one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import CheckpointError
from zimgkit.engines.tensors.dtypes import BY_NAME
from zimgkit.engines.tensors.safetensors import TensorInfo

LOWEST = {
    "float64": 0x7FF0_0000_0000_0000,
    "float32": 0x7F80_0000,
    "bfloat16": 0x7F80,
    "float16": 0x7C00,
    "float8_e5m2": 0x7C,
    "float8_e4m3fn": 0x7F,  # The one pattern of this format, which has no infinities.
}
"""Element type -> the bits of the lowest positive value that is no finite number."""
BLOCK = 1 << 18
"""Bytes looked at at a time, so few that the second look finds them in a processor's cache."""
HINT = "fetch the checkpoint again"


def count_non_finite(stored: NDArray[Any], dtype: str) -> int:
    """How many values are NaN or infinite.

    Args:
        stored: of any shape, in the storage type of the element type.
        dtype: the element type; those of whole numbers have none.
    """
    lowest = LOWEST.get(dtype)
    if lowest is None:
        return 0
    size = BY_NAME[dtype].storage.itemsize
    signed = np.ascontiguousarray(stored).reshape(-1).view(f"<i{size}")
    step, sign = BLOCK // size, 1 << (8 * size - 1)
    found = 0
    for start in range(0, signed.size, step):
        block = signed[start : start + step]
        if block.max() >= lowest or block.view(f"<u{size}").max() >= lowest | sign:
            found += int(np.count_nonzero((block & (sign - 1)) >= lowest))
    return found


def count_in_words(count: int) -> str:
    """A count of such values, for messages."""
    return f"{count:,} value{'s' * (count != 1)} that {'are' if count != 1 else 'is'} NaN or infinite"


class LinkedTensors:
    """Counts what is not finite in linked files, while those are hashed; what nobody wants of them may be anything."""

    def __init__(self, sources: Mapping[TensorInfo, TensorInfo]) -> None:
        """Take the tensors.

        Args:
            sources: where each lies in the bundle -> where it lies in the checkpoint, which messages name.
        """
        self._sources = sources
        self._files: dict[Path, list[TensorInfo]] = defaultdict(list)
        for info in sorted(sources, key=lambda info: info.offset):
            self._files[info.file].append(info)
        self._counts: Counter[TensorInfo] = Counter()

    def look(self, path: Path, offset: int, chunk: bytes) -> None:
        """Count in some bytes of a file, which end between two values, as all chunks of whole words do."""
        infos, end = self._files.get(path, []), offset + len(chunk)
        for info in infos[max(0, bisect_right(infos, offset, key=lambda info: info.offset) - 1) :]:
            if info.offset >= end:
                break
            first, last = max(info.offset, offset), min(info.offset + info.nbytes, end)
            if first < last:
                storage = BY_NAME[info.dtype].storage
                stored = np.frombuffer(chunk, storage, (last - first) // storage.itemsize, first - offset)
                if count := count_non_finite(stored, info.dtype):
                    self._counts[info] += count

    def check(self) -> None:
        """Complain of what was found.

        Raises:
            CheckpointError: a tensor has NaN or Inf; it names the first, and says how many there are.
        """
        for info in sorted(self._counts, key=lambda info: (info.file, info.offset)):
            source, others = self._sources[info], len(self._counts) - 1
            more = f" (and {others} more tensor{'s' * (others > 1)} likewise)" if others else ""
            message = f"{source.file}: {source.name!r} has {count_in_words(self._counts[info])}{more}"
            raise CheckpointError(message, HINT)
