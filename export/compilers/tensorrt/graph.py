"""Prepare a bundle's graph for TensorRT's parser: weights by name only, and attention that may be decomposed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper

from zimgkit.engines.bundle import Bundle, Range
from zimgkit.engines.errors import BundleError
from zimgkit.engines.tensors.safetensors import view
from zimgkit.export.compilers.tensorrt.plugins import call_plugins

DECOMPOSABLE = "TRT_decomposable"
"""The attribute by which a node allows TensorRT to compute attention in parts where it has no fused kernel for it: in
float32, or for wide heads such as a VAE's. Without it such a graph is refused; with it fused kernels still go first."""

QUANTIZING = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Graph:
    """A graph and its weights, as a plan is compiled from them."""

    component: str
    model: bytes
    """The ONNX model, which has the names of its weights and not their data."""
    weights: dict[str, NDArray[Any]]
    """Initializer -> its data, memory-mapped from the bundle's files."""
    attentions: tuple[str, ...]
    """The names of the nodes that call a block with attention."""
    products: tuple[str, ...] = ()
    """The matrix products of quantized inputs, each as ``node | call``."""


def read_graph(
    bundle: Bundle, component: str, profiles: Sequence[Mapping[str, Range]] = (), *, plugins: bool = False
) -> Graph:
    """Read a component's graph in the bundle's own precision; its weights are memory-mapped.

    Args:
        bundle: an open bundle.
        component: one that has a graph.
        profiles: the shape profiles it will be compiled for. A dynamic dimension that has one length in all of them
            becomes static before the parser sees it, so what the graph computes from shapes is folded.
        plugins: whether it calls operators of ours where it computes what they do.

    Raises:
        BundleError: the graph is broken, or names a weight that the bundle does not have.
    """
    path = bundle.file(next(iter(bundle.component(component).graphs.values())))
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise BundleError(f"{path} is not an ONNX model ({error})", "build the bundle again") from None
    tensors = bundle.tensors(component)
    weights = {}
    for initializer in model.graph.initializer:
        if initializer.data_location == onnx.TensorProto.EXTERNAL:
            if initializer.name not in tensors:
                raise BundleError(
                    f"{path} takes {initializer.name}, which is in none of its weight files", "build the bundle again"
                )
            weights[initializer.name] = view(tensors[initializer.name])
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if length := _static_length(dim.dim_param, profiles):
                dim.dim_value = length
    if plugins:
        model = call_plugins(model)
    with_attention = {(function.domain, function.name) for function in model.functions if _make_decomposable(function)}
    calls = [node for node in model.graph.node if (node.domain, node.op_type) in with_attention]
    products = _products(model)
    _make_names_unique(model)
    return Graph(component, model.SerializeToString(), weights, tuple(call.name for call in calls), products)


def _static_length(dimension: str, profiles: Sequence[Mapping[str, Range]]) -> int | None:
    """The one length that a dynamic dimension has in all profiles; None where it has several."""
    lengths = {length for ranges in profiles for length in ranges.get(dimension, ())}
    return lengths.pop() if len(lengths) == 1 else None


def _make_decomposable(function: onnx.FunctionProto) -> bool:
    """Let TensorRT decompose a function's attention where it has no fused kernel; returns whether there is any."""
    found = [node for node in function.node if node.op_type == "Attention"]
    for node in found:
        node.attribute.append(helper.make_attribute(DECOMPOSABLE, 1))
    return bool(found)


def _products(model: onnx.ModelProto) -> tuple[str, ...]:
    """The matrix products whose first input is quantized, in all calls of all functions, each as ``node | call``."""
    found: dict[tuple[str, str], list[str]] = {}
    for function in model.functions:
        makers = {output: node for node in function.node for output in node.output}

        def reads_quantized(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto] = makers) -> bool:
            maker = makers.get(node.input[0])
            if maker is None or maker.op_type != "DequantizeLinear":
                return False
            return maker.input[0] in makers and makers[maker.input[0]].op_type == "QuantizeLinear"

        names = [n.name for n in function.node if n.op_type in ("MatMul", "Gemm") and reads_quantized(n)]
        found[function.domain, function.name] = names
    return tuple(
        f"{name} | {call.name}" for call in model.graph.node for name in found.get((call.domain, call.op_type), ())
    )


def _make_names_unique(model: onnx.ModelProto) -> None:
    """Give each call of a function with Q/DQ nodes a copy of that function, whose Q/DQ nodes have unique names.

    TensorRT's parser makes the names of all other layers unique itself, and refuses a second Q/DQ layer of one name.
    """
    functions = {(function.domain, function.name): function for function in model.functions}
    for call in model.graph.node:
        function = functions.get((call.domain, call.op_type))
        if function is None or not any(node.op_type in QUANTIZING for node in function.node):
            continue
        own = model.functions.add()
        own.CopyFrom(function)
        own.name = f"{function.name} of {call.name}"
        for node in own.node:
            if node.op_type in QUANTIZING:
                node.name = f"{call.name}/{node.name}"
        call.op_type = own.name
