"""What calibration saw of the inputs of linears, how it is kept, and which ranges follow from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.errors import UsageError
from zimgkit.engines.files import replacing
from zimgkit.engines.tensors.safetensors import read_header, view, write
from zimgkit.export.quantization.formats import Array, Format, round_up

BINS = 2048
VERSION = 1
KIND = "zimg-calibration"
PERCENTILE = 99.99
CLIPS = tuple(n / 64 for n in range(16, 65))
"""Parts of the largest magnitude that the MSE range is searched among."""


@dataclass
class InputStatistics:
    """One input of linears, over all runs."""

    channels: Array
    """(in,) float32: the largest magnitude of each channel."""
    histogram: NDArray[np.float64]
    """(BINS,): how many values have a magnitude in each of equal bins from 0 to ``top``."""
    top: float
    """A power of two, at or above the largest magnitude."""

    @classmethod
    def empty(cls, width: int) -> InputStatistics:
        """Of no values yet."""
        return cls(np.zeros(width, np.float32), np.zeros(BINS), 2.0**-20)

    @property
    def absmax(self) -> float:
        """The largest magnitude."""
        return float(self.channels.max())

    def add(self, channels: Array, count: Callable[[float], NDArray[np.float64]]) -> None:
        """Count some values in.

        Args:
            channels: (in,), their largest magnitudes.
            count: gives their histogram up to a magnitude.
        """
        self.channels = np.maximum(self.channels, channels)
        while self.top < self.absmax:
            self.top *= 2
            pairs = self.histogram.reshape(-1, 2).sum(axis=1)
            self.histogram = np.concatenate([pairs, np.zeros(BINS // 2)])
        self.histogram += count(self.top)

    def range(self, method: str, number_format: Format) -> float:
        """The largest magnitude that shall be represented.

        Args:
            method: ``"max"``, ``"percentile"`` or ``"mse"``.
            number_format: what values will be rounded to.
        """
        if method == "percentile":
            reached = np.cumsum(self.histogram) >= PERCENTILE / 100 * self.histogram.sum()
            return min(self.absmax, float(np.argmax(reached) + 1) * self.top / BINS)
        if method == "mse":
            return min((clip * self.absmax for clip in CLIPS), key=lambda top: self._error(top, number_format))
        return self.absmax

    def _error(self, largest: float, number_format: Format) -> float:
        """The squared error of rounding all values, each taken for the middle of its bin, to a range."""
        centers = ((np.arange(BINS) + 0.5) * (self.top / BINS)).astype(np.float32)
        scale = np.float32(max(largest, 1e-30) / number_format.largest)
        stored = number_format.round(np.minimum(centers / scale, np.float32(number_format.largest)))
        rounded = number_format.widen(stored) * scale
        return float((self.histogram * (rounded.astype(np.float64) - centers) ** 2).sum())


RANGES = ("max", "percentile", "mse")


@dataclass
class Statistics:
    """Of all components that were calibrated."""

    inputs: dict[str, dict[str, InputStatistics]] = field(default_factory=dict)
    """Component -> the first linear that reads an input, by its weight's name -> the input."""
    readers: dict[str, dict[str, str]] = field(default_factory=dict)
    """Component -> every linear, by its weight's name -> the first one that reads the same input."""
    made: dict[str, Any] = field(default_factory=dict)
    """What they were made from and with."""

    def first_reader(self, component: str, weight: str) -> str | None:
        """The first linear that reads the input of this one, by its weight's name; None where neither ever ran.

        Raises:
            UsageError: the linear is none of those that were calibrated.
        """
        first_reader = self.readers.get(component, {}).get(weight)
        if first_reader is None:
            message = f"the calibration has nothing of {weight} of {component}: it is of another model"
            raise UsageError(message, "calibrate this one: zimg-export calibrate")
        return first_reader if first_reader in self.inputs.get(component, {}) else None

    def save(self, path: Path) -> None:
        """Write to a safetensors file, beside it first."""
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
            SafetensorsError: it is no safetensors file.
            UsageError: it is one, but none of these.
        """
        header = read_header(path)
        try:
            metadata = _metadata(path)
            if (metadata["kind"], metadata["version"]) != (KIND, str(VERSION)):
                raise ValueError("of another kind or version")
            readers, made = json.loads(metadata["readers"]), json.loads(metadata["made"])
            inputs: dict[str, dict[str, InputStatistics]] = {}
            for key in header:
                component, name, what = key.split("/")
                if what == "channels":
                    parts = [np.array(view(header[f"{component}/{name}/{part}"])) for part in ("channels", "histogram")]
                    top = float(view(header[f"{component}/{name}/top"])[0])
                    inputs.setdefault(component, {})[name] = InputStatistics(parts[0], parts[1], top)
        except (KeyError, ValueError, TypeError) as error:
            message = f"{path} holds no calibration that this zimgkit reads ({error})"
            raise UsageError(message, "make one with: zimg-export calibrate") from None
        return cls(inputs, readers, made)


def _metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        found: dict[str, str] = json.loads(file.read(length)).get("__metadata__", {})
    return found


def smoothing(channels: Array, columns: Array, alpha: float) -> Array:
    """SmoothQuant's factors: what weights are multiplied by and inputs divided by, channel by channel.

    ``s = max|x|^alpha / max|w|^(1 - alpha)`` (Xiao et al., 2022, equation 4), rounded to a power of two: then dividing
    an input by it, or a norm's weight, rounds nothing.

    Args:
        channels: (in,), the largest magnitude of each channel of the input.
        columns: (in,), of each column of the weights that read it.
        alpha: how much of the outliers goes to the weights; 0 leaves all as it is.

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
    """The scale of an input whose largest magnitude is this one; 1 where it is always zero."""
    ratio = np.array([largest / number_format.largest], np.float32)
    return float(round_up(np.maximum(ratio, np.float32(1e-30)))[0]) if largest > 0 else 1.0
