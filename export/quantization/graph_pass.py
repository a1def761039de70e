"""Insert Q/DQ nodes into an assembled graph: at quantized weights and, in schemes that quantize them, at inputs.

A block is one function for all its calls, and a recipe may quantize a weight in one call and not in another: a function
gets a variant for each set of its weights that is quantized. In a variant ``DequantizeLinear`` replaces the weight, and
an input passes through ``QuantizeLinear`` and ``DequantizeLinear``, once for all linears that read it. Compilers and
ONNX Runtime fuse these with the product into one in integers or float8.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from zimgkit.engines.tensors.dtypes import BY_NAME
from zimgkit.engines.tensors.safetensors import TensorInfo
from zimgkit.export.graphs.external import external
from zimgkit.export.graphs.nodes import constant, insert
from zimgkit.export.quantization.formats import OWN_SCALE, Format, Scheme
from zimgkit.export.quantization.integer_products import DYNAMIC
from zimgkit.export.quantization.linears import Linear, calls, linears, present, weight_shape
from zimgkit.export.quantization.quantized_weights import INPUT_SCALE, SMOOTH, WEIGHT_SCALE


@dataclass(frozen=True)
class _Variant:
    """A function with some of its weights quantized."""

    function: ir.Function
    scales: tuple[tuple[int, str], ...]
    """Its additional inputs, the scales: the index of a weight among the call's inputs, and the suffix of the scale."""


class Quantize(ir.passes.InPlacePass):
    """Quantize some linears of a model.

    Args:
        scheme: how linears are quantized.
        tensors: the bundle's tensors by name: the quantized weights, their scales, and the scales of inputs, named
            for the first reader of each.
        weights: the names of the weights that are quantized.
        compute: the element type that the graph computes in.
        folder: the folder of the graph, to which its references to weight files are relative.
    """

    def __init__(
        self,
        scheme: Scheme,
        tensors: Mapping[str, TensorInfo],
        weights: Collection[str],
        compute: str,
        folder: Path,
    ) -> None:
        super().__init__()
        self._scheme = scheme
        self._tensors = tensors
        self._weights = frozenset(weights)
        self._compute = ir.DataType(BY_NAME[compute].onnx)
        self._folder = folder
        self._own_scales = any(
            f"{name}{WEIGHT_SCALE}" in tensors and tensors[f"{name}{WEIGHT_SCALE}"].dtype == OWN_SCALE
            for name in self._weights
        )
        self._variants: dict[tuple[Any, ...], _Variant] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the model in place.

        Raises:
            RuntimeError: a weight is in no linear of the graph; a bug in a network, never a user's fault.
        """
        done: set[str] = set()
        model.meta[DYNAMIC] = self._scheme.is_dynamic
        for node, function, given in calls(model):
            found = [linear for linear in linears(function) if given[linear.weight].name in self._weights]
            if not found:
                continue
            variant = self._variant(model, function, found, given)
            node.op_type = variant.function.name
            values = [present(value) for value in node.inputs]
            scales = [self._initializer(model, f"{values[index].name}{suffix}") for index, suffix in variant.scales]
            node.resize_inputs(len(values) + len(scales))
            for index, value in enumerate(scales, start=len(values)):
                node.replace_input_with(index, value)
            for linear in found:
                self._retype(given[linear.weight])
                done.add(str(given[linear.weight].name))
        if missing := self._weights - done:
            raise RuntimeError(f"{min(missing)} is in no linear of the graph")
        called = {node.op_identifier() for node in model.graph}
        for identifier in [key for key in model.functions if key not in called]:
            del model.functions[identifier]
        return ir.passes.PassResult(model, modified=bool(done))

    def _initializer(self, model: ir.Model, name: str) -> ir.Value:
        if name not in model.graph.initializers:
            value = ir.Value(name=name)
            self._point(value, self._tensors[name])
            model.graph.initializers[name] = value
        return model.graph.initializers[name]

    def _retype(self, value: ir.Value) -> None:
        self._point(value, self._tensors[str(value.name)], self._scheme.weights)

    def _point(self, value: ir.Value, info: TensorInfo, number_format: Format | None = None) -> None:
        """Point an initializer to a tensor of a weight file; packed values have the shape that they unpack to."""
        dtype = ir.DataType(number_format.onnx) if number_format else None
        data = external(info, self._folder, dtype, value.shape if number_format else None)
        value.const_value = data
        value.shape, value.type = data.shape, ir.TensorType(data.dtype)

    def _variant(
        self, model: ir.Model, function: ir.Function, found: list[Linear], given: Mapping[ir.Value, ir.Value]
    ) -> _Variant:
        inputs = list(function.inputs)
        smoothed = frozenset(
            inputs.index(linear.first_reader)
            for linear in found
            if f"{given[linear.first_reader].name}{SMOOTH}" in self._tensors
        )
        key = (function.identifier(), frozenset(inputs.index(linear.weight) for linear in found), smoothed)
        if key not in self._variants:
            count = sum(known[0] == function.identifier() for known in self._variants)
            shapes = {}
            for linear in found:
                weight = given[linear.weight]
                blocks = self._tensors[f"{weight.name}{WEIGHT_SCALE}"].shape[1:]
                shapes[inputs.index(linear.weight)] = (*weight_shape(weight), *blocks)
            variant = self._make(function, f"{function.name}_quantized{count or ''}", shapes, smoothed)
            model.functions[variant.function.identifier()] = variant.function
            self._variants[key] = variant
        return self._variants[key]

    def _make(
        self, original: ir.Function, name: str, shapes: Mapping[int, tuple[int, ...]], smoothed: Collection[int]
    ) -> _Variant:
        """Copy a function, and quantize some of its weights: index among its inputs -> shape (out, in[, blocks])."""
        function = original.clone()
        function.name = name
        parameters = list(function.inputs)
        scales: list[tuple[int, str]] = []

        def scale(value: ir.Value, suffix: str, before: ir.Node) -> ir.Value:
            """Add a scale to the inputs of the function, and cast it to the element type that is computed in."""
            parameter = ir.Value(name=f"{value.name}{suffix}")
            function.inputs.append(parameter)
            scales.append((parameters.index(value), suffix))
            if self._own_scales or self._compute == ir.DataType.BFLOAT16:
                return parameter
            return insert(function, before, "Cast", [parameter], {"to": self._compute})

        inputs: dict[ir.Value, ir.Value] = {}
        for linear in linears(function):
            place = parameters.index(linear.weight)
            if place not in shapes:
                continue
            node, source = linear.node, linear.input
            if self._scheme.activations is not None:
                if source not in inputs:
                    smooth = parameters.index(linear.first_reader) in smoothed
                    inputs[source] = self._input(function, linear, scale, smooth=smooth)
                node.replace_input_with(0, inputs[source])
            self._weight(function, linear, scale, shapes[place])
        return _Variant(function, tuple(scales))

    def _input(self, function: ir.Function, linear: Linear, scale: Any, *, smooth: bool) -> ir.Value:
        """Smooth, quantize and dequantize an input."""
        value, node, number_format = linear.input, linear.node, self._scheme.activations
        if smooth:
            value = insert(function, node, "Mul", [value, scale(linear.first_reader, SMOOTH, node)])
        step = scale(linear.first_reader, INPUT_SCALE, node)
        dtype, zero = ir.DataType(number_format.onnx if number_format else 0), 0
        if self._compute == ir.DataType.FLOAT and dtype == ir.DataType.INT8:
            # The same numbers, unsigned: ONNX Runtime does not fuse a signed input that several linears read.
            dtype, zero = ir.DataType.UINT8, 128
        point = constant(function, node, np.full((), zero, dtype.numpy()))
        quantized = insert(function, node, "QuantizeLinear", [value, step, point])
        return insert(function, node, "DequantizeLinear", [quantized, step, point])

    def _weight(self, function: ir.Function, linear: Linear, scale: Any, shape: tuple[int, ...]) -> None:
        """Replace a weight, or its cast, by the dequantized weight."""
        weight, number_format = linear.weight, self._scheme.weights
        first = linear.cast or _first_user(function, weight)
        attributes: dict[str, Any] = {"axis": 0}
        if number_format.blocks:
            attributes = {"axis": 1, "block_size": shape[1] // shape[2]}
        inputs = [weight, scale(weight, WEIGHT_SCALE, first)]
        if self._compute == ir.DataType.FLOAT and number_format.onnx == ir.DataType.INT8:
            # ONNX Runtime's conversion from signed to unsigned integers adds a single zero point to per-channel scales,
            # unless there is one for each channel already.
            inputs.append(constant(function, first, np.zeros(shape[:1], np.int8)))
        users = [(use.node, use.idx) for use in (linear.cast.outputs[0] if linear.cast else weight).uses()]
        dequantized = insert(function, first, "DequantizeLinear", inputs, attributes)
        if self._own_scales and self._compute != ir.DataType.FLOAT:
            # Rounded once, as the same values in a bundle that is not quantized.
            dequantized = insert(function, first, "Cast", [dequantized], {"to": self._compute})
        for user, index in users:
            user.replace_input_with(index, dequantized)
        if linear.cast is not None:
            function.remove(linear.cast, safe=True)
        weight.type = ir.TensorType(ir.DataType(number_format.onnx))


def _first_user(function: ir.Function, value: ir.Value) -> ir.Node:
    users = {use.node for use in value.uses()}
    return next(node for node in function if node in users)


def quantize_graph(
    scheme: Scheme,
    weights: Sequence[str],
    tensors: Mapping[str, TensorInfo],
    folder: Path,
    model: ir.Model,
    compute: str,
    parameters: Collection[str],
) -> None:
    """Quantize those of some weights that a graph takes.

    Args:
        scheme: how linears are quantized.
        weights: the parameters that are quantized.
        tensors: parameter or scale -> where it lies in the bundle.
        folder: the bundle's.
        model: the graph, which is changed.
        compute: the element type that it computes in.
        parameters: those that it takes.
    """
    by_name = {info.name: info for info in tensors.values()}
    Quantize(scheme, by_name, [tensors[name].name for name in weights if name in parameters], compute, folder)(model)
