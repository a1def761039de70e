"""Stream float weights into quantized weights and their scales; needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import CheckpointError
from zimgkit.engines.tensors.dtypes import to_float32
from zimgkit.engines.tensors.safetensors import view
from zimgkit.export.checkpoints.stored import Decoded, Integers
from zimgkit.export.quantization.formats import (
    INT8,
    OWN_SCALE,
    SCALE,
    SCHEMES,
    Array,
    Format,
    Scheme,
    block_size,
    decode,
    encode,
    fits,
    stored_scales,
    weight_scales,
)
from zimgkit.export.weights.stream import PIECE, Encoding, Rows, Wanted, read_pieces

Make = Callable[[Rows], Iterator[NDArray[Any]]]
"""As in :class:`zimgkit.export.weights.stream.Encoding`."""
ON_THE_HOST = Scheme(INT8)
"""The scheme of components without a graph, in every precision: numpy multiplies by their weights on the host."""
WEIGHT_SCALE, INPUT_SCALE, SMOOTH = ".scale", ".input_scale", ".smooth"
"""Suffixes of the names of scales, after the name of a weight; an input's scales have that of its first reader."""


def scheme_of(precision: str, *, on_the_host: bool) -> Scheme:
    """How a precision quantizes the linears of a component.

    Args:
        precision: a key of :data:`zimgkit.export.quantization.formats.SCHEMES`.
        on_the_host: whether the component has no graph, and is computed on the host.
    """
    return ON_THE_HOST if on_the_host else SCHEMES[precision]


class Rounding:
    """Counts what is rounded off."""

    def __init__(self) -> None:
        self._error = self._norm = 0.0

    def add(self, values: Array, rounded: Array) -> None:
        """Add numbers, and what became of them."""
        self._error += float(np.square(rounded - values, dtype=np.float64).sum())
        self._norm += float(np.square(values, dtype=np.float64).sum())

    @property
    def relative(self) -> float:
        """The norm of the difference over that of the numbers."""
        return math.sqrt(self._error / self._norm) if self._norm else 0.0


def integers_of(want: Wanted, number_format: Format) -> Integers | None:
    """The integers of this format that a weight is stored in and stays; None where there are none."""
    source = want.source
    integers = source.integers if isinstance(source, Decoded) and want.transform is None and not want.addends else None
    return integers if integers is not None and integers.bits == number_format.bits else None


def weight_wanted(
    name: str,
    want: Wanted,
    number_format: Format,
    factors: Array | None = None,
    *,
    scale: str = SCALE,
    blocks: int | None = None,
    rounding: Rounding | None = None,
) -> dict[str, Wanted]:
    """Describe a quantized weight and its scales.

    Args:
        name: of the parameter.
        want: the float weight, (out, in).
        number_format: the format of its values.
        factors: (in,) float32, which its columns are multiplied by first.
        scale: the element type of scales. Where it is :data:`.formats.OWN_SCALE`, integers of this format and as many
            scales stay what they are.
        blocks: how many scales a row has where there are several; by :func:`.formats.block_size` where None.
        rounding: counts what is rounded off.

    Returns:
        The parameter's name and that of its scales -> how to write them.
    """
    out, width = want.shape
    tensor = want.source.name
    blocks = blocks or width // (block_size(width) or 1) if number_format.blocks else 1
    integers = integers_of(want, number_format) if scale == OWN_SCALE else None

    def scaled(rows: Rows) -> Iterator[tuple[Array, Array]]:
        for piece in rows:
            with np.errstate(over="ignore"):
                values = piece if factors is None else piece * factors
            scales = weight_scales(values, number_format, blocks)
            if not fits(scales, number_format):
                message = f"{want.source.file}: {tensor!r} has values up to {np.abs(values).max():.3g}"
                hint = "keep it as it is with a recipe, or check the checkpoint"
                raise CheckpointError(f"{message}, which have no scale in bfloat16", hint)
            yield values, scales

    def stored(rows: Rows) -> Iterator[NDArray[Any]]:
        for values, scales in scaled(rows):
            found = encode(values, scales, number_format)
            if rounding is not None:
                rounding.add(values, decode(found, scales, number_format))
            yield found

    def scales_alone(rows: Rows) -> Iterator[NDArray[Any]]:
        for _, scales in scaled(rows):
            yield stored_scales(scales, scale)

    makes: tuple[Make, Make] = (stored, scales_alone)
    if integers is not None and integers.blocks == blocks and factors is None:
        makes = _as_they_are(integers, number_format, want.shape)
    packed = width // 2 if number_format.blocks else width
    scale_shape = (out, blocks) if number_format.blocks else (out,)
    return {
        name: replace(want, shape=(out, packed), encoding=Encoding(number_format.stored, makes[0])),
        name + WEIGHT_SCALE: replace(want, shape=scale_shape, encoding=Encoding(scale, makes[1]), suffix=WEIGHT_SCALE),
    }


def _as_they_are(integers: Integers, number_format: Format, shape: tuple[int, ...]) -> tuple[Make, Make]:
    """What writes the integers of a matrix, and their scales, without reading its values."""
    out, width = shape
    step = max(1, PIECE // width)
    ends = [(start, min(start + step, out)) for start in range(0, out, step)]

    def stored(_: Rows) -> Iterator[NDArray[Any]]:
        for start, stop in ends:
            # Rounding changes no integer: it packs them.
            yield number_format.round(integers.rows(start, stop).astype(np.float32))

    def scales_alone(_: Rows) -> Iterator[NDArray[Any]]:
        for start, stop in ends:
            yield integers.scales(start, stop)

    return stored, scales_alone


def as_stored(bundle: Bundle, component: str, wanted: Mapping[str, Wanted]) -> dict[str, Wanted]:
    """Describe a component's weights and scales as a quantized bundle has them.

    SmoothQuant's factors, which follow from a calibration, are taken from the bundle.

    Args:
        bundle: an open bundle.
        component: its name.
        wanted: parameter -> the float weight, under the tensor's name in the bundle.
    """
    quantization, tensors = bundle.manifest.quantization, bundle.tensors(component)
    if quantization is None:
        return dict(wanted)
    result = dict(wanted)
    number_format = _weight_format(bundle, component)
    inputs = quantization.inputs.get(component, {})
    for name, want in wanted.items():
        tensor = want.source.name
        if tensor + WEIGHT_SCALE in tensors:
            smooth = tensors.get(inputs.get(tensor, tensor) + SMOOTH)
            factors = None if smooth is None else np.reciprocal(to_float32(np.array(view(smooth)), smooth.dtype))
            scales = tensors[tensor + WEIGHT_SCALE]
            blocks = scales.shape[1] if number_format.blocks else None
            result |= weight_wanted(name, want, number_format, factors, scale=scales.dtype, blocks=blocks)
    return result


def dequantized(bundle: Bundle, component: str, name: str) -> tuple[tuple[int, ...], Rows] | None:
    """A weight of a quantized bundle as the numbers that it stands for, without SmoothQuant's factors.

    Args:
        bundle: an open bundle.
        component: its name.
        name: the tensor's in the bundle.

    Returns:
        Its shape, and its rows in float32, some at a time; None where it is not quantized.
    """
    quantization, tensors = bundle.manifest.quantization, bundle.tensors(component)
    if quantization is None or name + WEIGHT_SCALE not in tensors:
        return None
    number_format = _weight_format(bundle, component)
    stored, scales = tensors[name], tensors[name + WEIGHT_SCALE]
    smooth = tensors.get(quantization.inputs.get(component, {}).get(name, name) + SMOOTH)
    factors = None if smooth is None else to_float32(np.array(view(smooth)), smooth.dtype)
    (out, width), blocks = stored.shape, scales.shape[1] if number_format.blocks else 1
    step = max(1, PIECE // width)

    def rows() -> Rows:
        pairs = zip(read_pieces(stored, step * width), read_pieces(scales, step * blocks), strict=True)
        for values, of_rows in pairs:
            found = decode(values.reshape(-1, width), to_float32(of_rows, scales.dtype), number_format)
            yield found if factors is None else found * factors

    return (out, width * 2 if number_format.blocks else width), rows()


def float_shapes(bundle: Bundle, component: str, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of a component's tensors before they were quantized, without those of scales.

    Args:
        bundle: an open bundle.
        component: its name.
        names: of its tensors.
    """
    tensors = bundle.tensors(component)
    shapes = {name: tensors[name].shape for name in names}
    if bundle.manifest.quantization is None:
        return shapes
    # A scale has the name of a tensor and a suffix.
    shapes = {name: shape for name, shape in shapes.items() if name.rpartition(".")[0] not in tensors}
    if _weight_format(bundle, component).blocks:
        packed = [name for name in shapes if name + WEIGHT_SCALE in tensors]
        shapes |= {name: (shapes[name][0], 2 * shapes[name][1]) for name in packed}
    return shapes


def _weight_format(bundle: Bundle, component: str) -> Format:
    """The format of the weights of a quantized bundle's component."""
    return scheme_of(bundle.manifest.quantized, on_the_host=not bundle.component(component).graphs).weights
