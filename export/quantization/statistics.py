"""Calibration statistics of the inputs of linears: how they are stored, and which ranges and scales follow."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import UsageError
from zimgkit.engines.files import replacing
from zimgkit.engines.tensors.safetensors import TensorInfo, read_header, read_metadata, view, write
from zimgkit.export.quantization.formats import Array, Format, round_up

BINS = 2048
"""Of the histograms of magnitudes."""
LARGEST = 2.0**127
"""The largest magnitude that is counted: the upper end of a histogram is a power of two, and a float32."""
VERSION = 1
KIND = "zimg-calibration"
PERCENTILE = 99.99
"""The percentage of magnitudes within the range of the method ``"percentile"``."""
CLIPS = tuple(n / 64 for n in range(16, 65))
"""The candidates of the method ``"mse"``: ranges as fractions of the largest magnitude."""


@dataclass
class InputStatistics:
    """The statistics of one input of linears, over all runs."""

    channels: Array
    """(in,) float32: the largest magnitude of each channel."""
    histogram: NDArray[np.float64]
    """(BINS,) float64: how many magnitudes are in each of equal bins from 0 to ``top``."""
    top: float
    """The upper end of the histogram: a power of two, at or above the largest magnitude."""

    @classmethod
    def empty(cls, width: int) -> InputStatistics:
        """Make the statistics of no values yet, of an input of this many channels."""
        return cls(np.zeros(width, np.float32), np.zeros(BINS), 2.0**-20)

    @property
    def absmax(self) -> float:
        """The largest magnitude."""
        return float(self.channels.max())

    def add(self, channels: Array, count: Callable[[float], NDArray[np.float64]]) -> None:
        """Add some values.

        Args:
            channels: (in,) float32, the largest magnitude of each channel.
            count: gives the (BINS,) histogram of their magnitudes from 0 to its argument.
        """
        self.channels = np.maximum(self.channels, channels)
        while self.top < self.absmax:
            self.top *= 2
            pairs = self.histogram.reshape(-1, 2).sum(axis=1)
            self.histogram = np.concatenate([pairs, np.zeros(BINS // 2)])
        self.histogram += count(self.top)

    def range(self, method: str, number_format: Format) -> float:
        """Compute the range of an input: the largest magnitude that its scale represents.

        Args:
            method: ``"max"``, ``"percentile"`` or ``"mse"``.
            number_format: the format that values are rounded to.
        """
        if method == "percentile":
            reached = np.cumsum(self.histogram) >= PERCENTILE / 100 * self.histogram.sum()
            return min(self.absmax, float(np.argmax(reached) + 1) * self.top / BINS)
        if method == "mse":
            return min((clip * self.absmax for clip in CLIPS), key=lambda top: self._error(top, number_format))
        return self.absmax

    def _error(self, largest: float, number_format: Format) -> float:
        """The sum of squared errors of rounding all values within a range; each counts as the middle of its bin."""
        centers = ((np.arange(BINS) + 0.5) * (self.top / BINS)).astype(np.float32)
        scale = np.float32(max(largest, 1e-30) / number_format.largest)
        stored = number_format.round(np.minimum(centers / scale, np.float32(number_format.largest)))
        rounded = number_format.widen(stored) * scale
        return float((self.histogram * (rounded.astype(np.float64) - centers) ** 2).sum())


RANGES = ("max", "percentile", "mse")
"""The methods that compute the range of an input."""


@dataclass
class Statistics:
    """The statistics of all components that were calibrated."""

    inputs: dict[str, dict[str, InputStatistics]] = field(default_factory=dict)
    """Component -> the first reader of an input, by its weight's name -> the statistics of that input."""
    readers: dict[str, dict[str, str]] = field(default_factory=dict)
    """Component -> every linear, by its weight's name -> the first reader of its input."""
    made: dict[str, Any] = field(default_factory=dict)
    """The checkpoint, the LoRAs and the calibration set they are of, and how many prompts are done."""

    def first_reader(self, component: str, weight: str) -> str | None:
        """The first reader of a linear's input, by its weight's name; None if that input was never computed.

        Raises:
            UsageError: the linear was not calibrated.
        """
        first_reader = self.readers.get(component, {}).get(weight)
        if first_reader is None:
            message = f"the calibration has nothing of {weight} of {component}: it is of another model"
            raise UsageError(message, "calibrate this one: zimg-export calibrate")
        return first_reader if first_reader in self.inputs.get(component, {}) else None

    def save(self, path: Path) -> None:
        """Write a safetensors file, which is replaced in one step."""
        tensors: dict[str, NDArray[Any]] = {}
        for component, inputs in self.inputs.items():
            for name, entry in inputs.items():
                tensors[f"{component}/{name}/channels"] = entry.channels
                tensors[f"{component}/{name}/histogram"] = entry.histogram
                tensors[f"{component}/{name}/top"] = np.array([entry.top])
        metadata = {"kind": KIND, "version": str(VERSION), "readers": json.dumps(self.readers)}
        with replacing(path) as part:
            write(
                part,
                {name: (value.dtype.name, value.shape) for name, value in tensors.items()},
                {name: [value] for name, value in tensors.items()},
                metadata | {"made": json.dumps(self.made, sort_keys=True, ensure_ascii=False)},
            )

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what :meth:`save` wrote.

        Raises:
            SafetensorsError: the file is not a safetensors file.
            UsageError: it does not hold calibration statistics.
        """
        header = read_header(path)
        try:
            metadata = read_metadata(path)
            if (metadata["kind"], metadata["version"]) != (KIND, str(VERSION)):
                raise ValueError("of another kind or version")
            readers = msgspec.json.decode(metadata["readers"], type=dict[str, dict[str, str]])
            made = msgspec.json.decode(metadata["made"], type=dict[str, Any])
            inputs: dict[str, dict[str, InputStatistics]] = {}
            for key in header:
                component, name, what = key.split("/")
                if what == "channels":
                    places = [header[f"{component}/{name}/{part}"] for part in ("channels", "histogram", "top")]
                    inputs.setdefault(component, {})[name] = _input_statistics(name, *places)
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            message = f"{path} holds no calibration statistics that this zimgkit reads ({error})"
            raise UsageError(message, "make one with: zimg-export calibrate") from None
        return cls(inputs, readers, made)


def _input_statistics(name: str, channels: TensorInfo, histogram: TensorInfo, top: TensorInfo) -> InputStatistics:
    """Read the statistics of one input; a ValueError says what is wrong with them."""
    found = [(info.dtype, info.shape) for info in (channels, histogram, top)]
    if (
        found != [("float32", (math.prod(channels.shape),)), ("float64", (BINS,)), ("float64", (1,))]
        or not channels.nbytes
    ):
        raise ValueError(f"{name} has tensors of other types or shapes")
    values = [np.array(view(info)) for info in (channels, histogram, top)]
    entry = InputStatistics(values[0], values[1], float(values[2][0]))
    # Comparisons with NaN are false.
    are_counts = np.isfinite(entry.histogram).all() and (entry.histogram >= 0).all()
    if not (are_counts and (entry.channels >= 0).all() and entry.absmax <= entry.top <= LARGEST and entry.top > 0):
        raise ValueError(f"{name} has NaN, Inf, or magnitudes out of their range")
    return entry


def smoothing(channels: Array, columns: Array, alpha: float) -> Array:
    """Compute SmoothQuant's factors: an input's channels are divided by them, and the weights' columns multiplied.

    ``s = max|x|^alpha / max|w|^(1 - alpha)`` (Xiao et al., 2022, equation 4), rounded to powers of two: dividing
    an input by those is exact.

    Args:
        channels: (in,), the largest magnitude of each channel of the input.
        columns: (in,), the largest magnitude of each column of the weights that read it.
        alpha: the share of the outliers that goes to the weights, 0 to 1; 0 changes nothing.

    Returns:
        (in,) float32.
    """
    if not alpha:
        return np.ones_like(channels)
    used = (channels > 0) & (columns > 0)
    exponents = alpha * np.log2(np.where(used, channels, 1)) - (1 - alpha) * np.log2(np.where(used, columns, 1))
    factors: Array = np.exp2(np.clip(np.rint(exponents), -16, 16)).astype(np.float32)
    return factors


def scale_for(largest: float, number_format: Format) -> float:
    """The scale, a bfloat16 number, of an input with this range; 1 where the input is always zero."""
    ratio = np.array([largest / number_format.largest], np.float32)
    return float(round_up(np.maximum(ratio, np.float32(1e-30)))[0]) if largest > 0 else 1.0
