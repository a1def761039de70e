"""Fake quantization, switched on and off linear by linear, in an unquantized bundle that PyTorch runs.

Weights and inputs are quantized and dequantized before each product, so the numbers are those of a quantized bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zimgkit.engines.bundle import Bundle
from zimgkit.engines.torch.engine import TorchEngine
from zimgkit.engines.torch.graph import load
from zimgkit.export.quantization.formats import FLOAT8, Format, block_size, scale_of
from zimgkit.export.quantization.linears import named_linears
from zimgkit.export.quantization.quantize import QuantizationSettings, QuantizedInput, quantized_inputs
from zimgkit.export.weights.stream import Wanted


def quantizable(bundle: Bundle, component: str, settings: QuantizationSettings) -> dict[str, Wanted]:
    """Find the weights of a component's linears that can be quantized, by name.

    Left out are linears that never ran in the calibration, because nothing reads their result, and in formats with
    per-block scales those whose rows no block size divides.
    """
    graph, tensors = next(iter(bundle.component(component).graphs.values())), bundle.tensors(component)
    found = {}
    for linear in named_linears(load(bundle, graph)):
        info = tensors[linear.weight]
        read = settings.statistics is None or settings.statistics.first_reader(component, linear.weight)
        if read and not (settings.scheme.weights.blocks and block_size(info.shape[1]) is None):
            found[linear.weight] = Wanted(info, info.shape)
    return found


def switch_quantization(
    engine: TorchEngine, bundle: Bundle, component: str, settings: QuantizationSettings, active: Collection[str]
) -> None:
    """Quantize those linears of an engine whose weights are in a collection, which may change between runs.

    Args:
        engine: of the component, computing in float32.
        bundle: the unquantized bundle it is of.
        component: its name.
        settings: how linears are quantized; the recipe is ignored.
        active: the names of the weights whose linears are quantized.
    """
    wanted, scheme = quantizable(bundle, component, settings), settings.scheme
    inputs: dict[str, QuantizedInput] = {}
    if scheme.activations is not None:
        for entry in quantized_inputs(component, wanted, settings, scheme.activations).values():
            inputs |= dict.fromkeys(entry.linears, entry)
    engine.wrap(
        {
            linear.label: _SwitchedLinear(
                active, linear.weight, scheme.weights, scheme.activations, inputs.get(linear.weight), linear.operator
            )
            for linear in named_linears(load(bundle, engine.graph))
            if linear.weight in wanted
        }
    )


@dataclass(frozen=True)
class _SwitchedLinear:
    """Wraps the product of a linear: quantized while its weight is active."""

    active: Collection[str]
    weight: str
    weights: Format
    activations: Format | None
    input: QuantizedInput | None
    operator: str

    def __call__(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def product(x: Tensor, weight: Tensor, *rest: Tensor) -> Any:
            if self.weight not in self.active:
                return call(x, weight, *rest)
            transposed = self.operator == "MatMul"
            rows = weight.mT if transposed else weight
            if self.input is not None and self.activations is not None:
                if self.input.factors is not None:
                    factors = torch.from_numpy(self.input.factors).to(x.device)
                    x, rows = x / factors, rows * factors
                x = rounded_input(x, self.input.scale, self.activations)
            rows = rounded_weight(rows, self.weights)
            return call(x, rows.mT if transposed else rows, *rest)

        return product


def rounded_weight(rows: Tensor, number_format: Format) -> Tensor:
    """Quantize and dequantize a weight (out, in) float32, with per-channel or per-block scales."""
    blocks = rows.reshape(len(rows), -1, block_size(rows.shape[1]) or 1) if number_format.blocks else rows[:, None]
    largest = blocks.abs().amax(-1, keepdim=True).cpu().numpy()
    scales = torch.from_numpy(scale_of(largest, number_format)).to(rows.device)
    return (_rounded(blocks / scales, number_format, number_format.largest) * scales).reshape(rows.shape)


def rounded_input(x: Tensor, scale: float, number_format: Format) -> Tensor:
    """Quantize and dequantize an input (..., in) float32, with one scale."""
    # An integer input may take the lowest number, -128, where a weight's range is symmetric.
    lowest = number_format.largest + (number_format is not FLOAT8)
    return _rounded(x / scale, number_format, lowest) * scale


def _rounded(values: Tensor, number_format: Format, lowest: float) -> Tensor:
    values = values.clamp(-lowest, number_format.largest)
    return values.to(torch.float8_e4m3fn).to(values.dtype) if number_format is FLOAT8 else values.round()
