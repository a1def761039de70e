"""Decide which weights of a bundle are quantized, and describe how they and their scales are written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from zimgkit.engines.errors import UsageError
from zimgkit.engines.tensors.dtypes import float32_to_bfloat16
from zimgkit.export.checkpoints.stored import Decoded
from zimgkit.export.networks.parts import Part
from zimgkit.export.networks.registry import QUANTIZED
from zimgkit.export.quantization.formats import OWN_SCALE, SCALE, SCHEMES, Array, Format, Scheme, block_size, fits
from zimgkit.export.quantization.keep import bits_of, form_of
from zimgkit.export.quantization.quantized_weights import (
    INPUT_SCALE,
    SMOOTH,
    Rounding,
    integers_of,
    scheme_of,
    weight_wanted,
)
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
    """The calibration statistics; needed where inputs are quantized."""
    range: str = "max"
    """The method that computes the ranges of inputs: ``"max"``, ``"percentile"`` or ``"mse"``."""
    smooth: float | None = None
    """SmoothQuant's alpha; the precision's own where None."""
    keep: bool = False
    """Whether the weights that a file holds in this precision are quantized, as they are where that can be, and no
    others."""

    @property
    def scheme(self) -> Scheme:
        """The scheme of the precision."""
        return SCHEMES[self.precision]

    @property
    def alpha(self) -> float:
        """SmoothQuant's alpha, 0 to 1."""
        return self.scheme.smooth if self.smooth is None else self.smooth

    def check(self) -> None:
        """Check that the settings fit each other.

        Raises:
            UsageError: they do not; the message says which.
        """
        if self.precision not in SCHEMES:
            raise UsageError(f"no precision is called {self.precision!r}", f"choose one of {', '.join(SCHEMES)}")
        if self.range not in RANGES:
            raise UsageError(f"no range is called {self.range!r}", f"choose one of {', '.join(RANGES)}")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"SmoothQuant's alpha is {self.alpha:g}", "give a number from 0 to 1")
        if self.scheme.activations is None and self.smooth:
            raise UsageError(f"{self.precision} does not quantize inputs, so nothing is smoothed", "leave it out")
        if self.alpha and self.range != "max":
            message = f"the range {self.range!r} needs the distribution of inputs before they are smoothed"
            raise UsageError(message, "add --smooth 0, or use the range max")
        self.recipe.check_components(QUANTIZED)


@dataclass(frozen=True)
class Quantized:
    """The weights of a component in a quantized bundle."""

    wanted: dict[str, Wanted]
    """Parameter or scale -> how it is written; unquantized parameters are unchanged."""
    quantized: tuple[str, ...]
    """The parameters that are quantized."""
    unquantized: dict[str, str]
    """The other linears: name of the weight in the checkpoint -> the reason."""
    inputs: dict[str, str]
    """Name of a quantized weight in the checkpoint -> that of the first reader of its input, which the scales have."""
    kept: tuple[str, ...] = ()
    """Those of the quantized whose integers are those of a file."""
    rounding: Rounding | None = None
    """What was rounded off of the others, once they are written; None where nothing was to be kept."""


def linear_weights(part: Part) -> list[str]:
    """The names of the weights of all linears of a part."""
    if part.network is None:
        names = [name.removesuffix(".weight") for name, shape in part.shapes.items() if len(shape) == 2]
        # Without a bias it is an embedding.
        return [f"{name}.weight" for name in names if f"{name}.bias" in part.shapes]
    modules = part.build(torch.float32).named_modules()
    return [f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear)]


def quantize(component: str, part: Part, wanted: Mapping[str, Wanted], settings: QuantizationSettings) -> Quantized:
    """Decide which linears of a component are quantized, and describe their weights and scales.

    Args:
        component: its name.
        part: the component before it is built.
        wanted: parameter -> the float tensor it comes from.
        settings: how linears are quantized.

    Raises:
        UsageError: the recipe names a linear that is not there, or the calibration is of another model.
        CheckpointError: a weight has NaN or Inf.
    """
    names = linear_weights(part)
    scheme = scheme_of(settings.precision, on_the_host=part.network is None)
    unquantized = settings.recipe.unquantized(settings.precision, component, names)
    first_readers: dict[str, str | None] = {}
    if settings.keep:
        sources = {name: wanted[name].source for name in names}
        others = {name: tensor for name, tensor in sources.items() if bits_of(tensor) != scheme.weights.bits}
        unquantized = {name: f"{form_of(tensor)} in the file" for name, tensor in others.items()}
    if scheme.weights.blocks:
        reason = "no block size divides its rows"
        unquantized |= {
            name: reason for name in names if name not in unquantized and block_size(wanted[name].shape[1]) is None
        }
    if scheme.activations is not None:
        reason = "nothing reads its result"
        first_readers = {
            name: _statistics(settings).first_reader(component, wanted[name].source.name) for name in names
        }
        unquantized |= {name: reason for name in names if name not in unquantized and first_readers[name] is None}
    chosen = tuple(name for name in names if name not in unquantized)
    result = dict(wanted)
    factors: dict[str, Array] = {}
    if scheme.activations is not None:
        factors = _inputs(component, {name: wanted[name] for name in chosen}, settings, scheme.activations, result)
    kept = tuple(name for name in chosen if settings.keep and integers_of(wanted[name], scheme.weights))
    rounding = Rounding() if settings.keep else None
    own_blocks = {name: _own_blocks(wanted[name]) if settings.keep else None for name in chosen}
    # All scales of a component are of one element type, with LoRAs and without, and all calls of a block have blocks of
    # one size.
    scale = OWN_SCALE if any(own_blocks.values()) else SCALE
    for name in chosen:
        result |= weight_wanted(
            *(name, wanted[name], scheme.weights, factors.get(name)),
            scale=scale,
            blocks=own_blocks[name],
            rounding=rounding,
        )
    return Quantized(
        result,
        chosen,
        {wanted[name].source.name: reason for name, reason in unquantized.items()},
        {wanted[name].source.name: first_reader for name in chosen if (first_reader := first_readers.get(name))},
        kept,
        rounding,
    )


def _own_blocks(want: Wanted) -> int | None:
    """How many scales a row has in the file."""
    integers = want.source.integers if isinstance(want.source, Decoded) else None
    return integers.blocks if integers else None


def _statistics(settings: QuantizationSettings) -> Statistics:
    if settings.statistics is None:
        raise UsageError(f"{settings.precision} needs a calibration", "name prompts or statistics with --calibration")
    return settings.statistics


@dataclass(frozen=True)
class QuantizedInput:
    """How one input of linears is quantized."""

    linears: tuple[str, ...]
    """The quantized linears that read it, by parameter."""
    scale: float
    """The one scale of all its values, after it was smoothed."""
    factors: Array | None
    """SmoothQuant's (in,) float32: its channels are divided by them, the columns of the weights multiplied; or None."""


def quantized_inputs(
    component: str, chosen: Mapping[str, Wanted], settings: QuantizationSettings, number_format: Format
) -> dict[str, QuantizedInput]:
    """Compute the scales, and SmoothQuant's factors, of the inputs of some linears.

    Args:
        component: its name.
        chosen: parameter -> the float weight, of the linears that are quantized.
        settings: how linears are quantized.
        number_format: the format of inputs.

    Returns:
        The first reader of an input, by its weight's name, whether that is quantized or not -> how it is quantized.

    Raises:
        UsageError: the calibration is of another model, has inputs that no scale represents, or there is none.
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
            with np.errstate(over="ignore"):
                largest = float((entry.channels / factors).max())
        scale = scale_for(largest, number_format)
        if not fits(np.array(scale, np.float32), number_format):
            message = f"the calibration has inputs of {first_reader} up to {largest:.3g}"
            raise UsageError(f"{message}, which have no scale in bfloat16", "check the checkpoint: zimg-export verify")
        result[first_reader] = QuantizedInput(tuple(names), scale, factors)
    return result


def _inputs(
    component: str,
    chosen: Mapping[str, Wanted],
    settings: QuantizationSettings,
    number_format: Format,
    result: dict[str, Wanted],
) -> dict[str, Array]:
    """Add the scales of inputs to ``result``, and return the factors of each linear's columns, (in,) float32."""
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
    """The largest magnitude of each column of a weight: (in,) float32."""
    found: Array = np.max([np.abs(rows).max(axis=0) for rows in read_rows(want)], axis=0)
    return found


def _constant(owner: Wanted, values: Array, suffix: str) -> Wanted:
    """Describe a tensor of given values in bfloat16, whose name is that of another tensor and a suffix."""
    stored = float32_to_bfloat16(values)
    return Wanted(owner.source, values.shape, encoding=Encoding(SCALE, lambda _: iter([stored])), suffix=suffix)
