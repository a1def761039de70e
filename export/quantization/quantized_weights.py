"""Stream float weights into quantized weights and their scales; needs no PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import CheckpointError
from zimgkit.engines.tensors.dtypes import to_float32
from zimgkit.engines.tensors.safetensors import view
from zimgkit.export.quantization.formats import (
    INT8,
    SCALE,
    SCHEMES,
    Array,
    Format,
    Scheme,
    block_size,
    encode,
    fits,
    stored_scales,
    weight_scales,
)
from zimgkit.export.weights.stream import PIECE, Encoding, Rows, Wanted, read_pieces

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


def weight_wanted(name: str, want: Wanted, number_format: Format, factors: Array | None = None) -> dict[str, Wanted]:
    """Describe a quantized weight and its scales.

    Args:
        name: of the parameter.
        want: the float weight, (out, in).
        number_format: the format of its values.
        factors: (in,) float32, which its columns are multiplied by first.

    Returns:
        The parameter's name and that of its scales -> how to write them.
    """
    out, width = want.shape
    tensor = want.source.name

    def scaled(rows: Rows) -> Iterator[tuple[Array, Array]]:
        for piece in rows:
            with np.errstate(over="ignore"):
                values = piece if factors is None else piece * factors
            scales = weight_scales(values, number_format)
            if not fits(scales, number_format):
                message = f"{want.source.file}: {tensor!r} has values up to {np.abs(values).max():.3g}"
                hint = "keep it as it is with a recipe, or check the checkpoint"
                raise CheckpointError(f"{message}, which have no scale in bfloat16", hint)
            yield values, scales

    def stored(rows: Rows) -> Iterator[NDArray[Any]]:
        for values, scales in scaled(rows):
            yield encode(values, scales, number_format)

    def scales_alone(rows: Rows) -> Iterator[NDArray[Any]]:
        for _, scales in scaled(rows):
            yield stored_scales(scales)

    packed = width // 2 if number_format.blocks else width
    scale_shape = (out, width // (block_size(width) or 1)) if number_format.blocks else (out,)
    return {
        name: replace(want, shape=(out, packed), encoding=Encoding(number_format.stored, stored)),
        name + WEIGHT_SCALE: replace(
            want, shape=scale_shape, encoding=Encoding(SCALE, scales_alone), suffix=WEIGHT_SCALE
        ),
    }


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
            result |= weight_wanted(name, want, number_format, factors)
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
            wide = number_format.widen(values.reshape(-1, width)).reshape(of_rows.size, -1)
            wide *= to_float32(of_rows, SCALE).reshape(-1, 1)
            found = wide.reshape(-1, width * (2 if number_format.blocks else 1))
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
