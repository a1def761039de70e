"""Which tensors of a bundle are quantized, and how each of them and its scales is made from the checkpoint's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from zimgkit.engines.errors import UsageError
from zimgkit.engines.tensors.dtypes import float32_to_bfloat16
from zimgkit.export.networks.parts import Part
from zimgkit.export.networks.registry import QUANTIZED
from zimgkit.export.quantization.formats import SCALE, SCHEMES, Array, Format, Scheme, block_of
from zimgkit.export.quantization.quantized_weights import INPUT_SCALE, SMOOTH, scheme_of, weight_wanted
from zimgkit.export.quantization.recipe import Recipe
from zimgkit.export.quantization.statistics import RANGES, Statistics, scale_for, smoothing
from zimgkit.export.weights.stream import Encoding, Wanted, read_rows


@dataclass(frozen=True)
class QuantizationSettings:
    """How a bundle is quantized."""

    precision: str
    """A key of :data:`zimgkit.export.quantization.formats.SCHEMES`."""
    recipe: Recipe
    statistics: Statistics | None = None
    """Of a calibration, where inputs are quantized."""
    range: str = "max"
    """Which range of its inputs is represented: ``"max"``, ``"percentile"`` or ``"mse"``."""
    smooth: float | None = None
    """SmoothQuant's alpha; the precision's own where None."""

    @property
    def scheme(self) -> Scheme:
        """What the precision does."""
        return SCHEMES[self.precision]

    @property
    def alpha(self) -> float:
        """SmoothQuant's alpha."""
        return self.scheme.smooth if self.smooth is None else self.smooth

    def check(self) -> None:
        """Check that the settings fit each other.

        Raises:
            UsageError: they do not.
        """
        if self.precision not in SCHEMES:
            raise UsageError(f"no precision is called {self.precision!r}", f"choose one of {', '.join(SCHEMES)}")
        if self.range not in RANGES:
            raise UsageError(f"no range is called {self.range!r}", f"choose one of {', '.join(RANGES)}")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"SmoothQuant's alpha is {self.alpha:g}", "give a number from 0 to 1")
        if self.scheme.activations is None and self.smooth:
            raise UsageError(f"{self.precision} leaves inputs as they are, so nothing is smoothed", "leave it out")
        if self.alpha and self.range != "max":
            message = f"the range {self.range!r} needs the distribution of inputs before they are smoothed"
            raise UsageError(message, "add --smooth 0, or use the range max")
        self.recipe.check_components(QUANTIZED)


@dataclass(frozen=True)
class Quantized:
    """A component's part of a quantized bundle."""

    wanted: dict[str, Wanted]
    """Parameter or scale -> what it comes from; what is not quantized is as it was."""
    quantized: tuple[str, ...]
    """The parameters that are."""
    kept: dict[str, str]
    """The linears' weights, by the checkpoint's names, that are not, and why."""
    inputs: dict[str, str]
    """The quantized weights, by the checkpoint's names, and those whose names the scales of their inputs bear."""


def linear_weights(part: Part) -> list[str]:
    """The names of the weights of all linears of a part."""
    if part.network is None:
        return [name for name, shape in part.shapes.items() if len(shape) == 2]
    modules = part.build(torch.float32).named_modules()
    return [f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear)]


def quantize(component: str, part: Part, wanted: Mapping[str, Wanted], settings: QuantizationSettings) -> Quantized:
    """Turn what a component takes from a checkpoint into what it takes in a quantized bundle.

    Args:
        component: its name.
        part: what it is.
        wanted: parameter -> what it comes from.
        settings: how.

    Raises:
        UsageError: the recipe names a linear that is not there, or the calibration is of another model.
        CheckpointError: a weight has NaN or Inf.
    """
    names = linear_weights(part)
    scheme = scheme_of(settings.precision, on_the_host=part.network is None)
    kept = settings.recipe.kept(settings.precision, component, names)
    first_readers: dict[str, str | None] = {}
    if scheme.weights.blocks:
        reason = "its rows have no blocks that divide them"
        kept |= {name: reason for name in names if name not in kept and block_of(wanted[name].shape[1]) is None}
    if scheme.activations is not None:
        reason = "nothing reads its result"
        first_readers = {
            name: _statistics(settings).first_reader(component, wanted[name].source.name) for name in names
        }
        kept |= {name: reason for name in names if name not in kept and first_readers[name] is None}
    chosen = tuple(name for name in names if name not in kept)
    result = dict(wanted)
    factors: dict[str, Array] = {}
    if scheme.activations is not None:
        factors = _inputs(component, {name: wanted[name] for name in chosen}, settings, scheme.activations, result)
    for name in chosen:
        result |= weight_wanted(name, wanted[name], scheme.weights, factors.get(name))
    return Quantized(
        result,
        chosen,
        {wanted[name].source.name: reason for name, reason in kept.items()},
        {wanted[name].source.name: first_reader for name in chosen if (first_reader := first_readers.get(name))},
    )


def _statistics(settings: QuantizationSettings) -> Statistics:
    if settings.statistics is None:
        raise UsageError(f"{settings.precision} needs a calibration", "name prompts or statistics with --calibration")
    return settings.statistics


@dataclass(frozen=True)
class QuantizedInput:
    """How one input of linears is quantized."""

    linears: tuple[str, ...]
    """Those of the chosen ones that read it."""
    scale: float
    factors: Array | None
    """(in,), what its channels are divided by first, and the columns of those linears multiplied; None for nothing."""


def quantized_inputs(
    component: str, chosen: Mapping[str, Wanted], settings: QuantizationSettings, number_format: Format
) -> dict[str, QuantizedInput]:
    """How the inputs of some linears are quantized.

    Args:
        component: which has them.
        chosen: parameter -> what it comes from, of the linears that are quantized.
        settings: how.
        number_format: what inputs are rounded to.

    Returns:
        By the name of the first linear that reads it, whether chosen or not.

    Raises:
        UsageError: the calibration is of another model, or there is none.
    """
    statistics = _statistics(settings)
    readers: dict[str, list[str]] = defaultdict(list)
    for name, want in chosen.items():
        readers[statistics.first_reader(component, want.source.name) or ""].append(name)
    result = {}
    for first_reader, names in readers.items():
        entry = statistics.inputs[component][first_reader]
        wants = [chosen[name] for name in names]
        if len(entry.channels) != wants[0].shape[1]:
            message = (
                f"the calibration has {len(entry.channels)} channels before {first_reader}, not {wants[0].shape[1]}"
            )
            raise UsageError(message, "it is of another model: calibrate this one")
        largest, factors = entry.range(settings.range, number_format), None
        if settings.alpha:
            columns = np.max([_columns(want) for want in wants], axis=0)
            factors = smoothing(entry.channels, columns, settings.alpha)
            largest = float((entry.channels / factors).max())
        result[first_reader] = QuantizedInput(tuple(names), scale_for(largest, number_format), factors)
    return result


def _inputs(
    component: str,
    chosen: Mapping[str, Wanted],
    settings: QuantizationSettings,
    number_format: Format,
    result: dict[str, Wanted],
) -> dict[str, Array]:
    """Add the scales of the inputs of linears to what is wanted; give the factors of each linear's columns."""
    by_tensor = {want.source.name: want for want in chosen.values()}
    factors: dict[str, Array] = {}
    for first_reader, entry in quantized_inputs(component, chosen, settings, number_format).items():
        # The name of the input's scales follows its first reader, whether that one is quantized or not.
        first = chosen[entry.linears[0]]
        owner = by_tensor.get(first_reader) or replace(first, source=replace(first.source, name=first_reader))
        if entry.factors is not None:
            factors |= dict.fromkeys(entry.linears, entry.factors)
            result[first_reader + SMOOTH] = _constant(owner, np.reciprocal(entry.factors), SMOOTH)
        result[first_reader + INPUT_SCALE] = _constant(owner, np.array(entry.scale, np.float32), INPUT_SCALE)
    return factors


def _columns(want: Wanted) -> Array:
    """The largest magnitude of each column of a weight."""
    found: Array = np.max([np.abs(rows).max(axis=0) for rows in read_rows(want)], axis=0)
    return found


def _constant(owner: Wanted, values: Array, suffix: str) -> Wanted:
    """Numbers that go into the bundle as they are, under the name of a tensor and a suffix."""
    stored = float32_to_bfloat16(values)
    return Wanted(owner.source, values.shape, encoding=Encoding(SCALE, lambda _: iter([stored])), suffix=suffix)
