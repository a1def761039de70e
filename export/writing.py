"""A component into a bundle's folder: its graphs, and its entry in the manifest."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes

from zimgkit.engines.bundle import CPU_GRAPH, Component
from zimgkit.engines.tensors.safetensors import TensorInfo
from zimgkit.export.attachments.cut import cut
from zimgkit.export.graphs.assemble import Assembled, assemble_all
from zimgkit.export.graphs.flash_attention import FlashAttention
from zimgkit.export.graphs.plan import Plan, record
from zimgkit.export.graphs.weights_first import WeightsFirst
from zimgkit.export.networks.parts import Cut, Part
from zimgkit.export.quantization.block_products import BlockProducts
from zimgkit.export.quantization.integer_products import IntegerProducts
from zimgkit.export.quantization.quantized_weights import INPUT_SCALE
from zimgkit.export.weights.layout import base_name, graph_name, lora_name

Rewrite = Callable[[ir.Model, str, Collection[str]], object]
"""Changes a graph, given the element type it computes in and the names of the parameters it takes."""


def write_component(
    name: str,
    part: Part,
    tensors: Mapping[str, TensorInfo],
    precision: str,
    folder: Path,
    rewrite: Rewrite | None = None,
    *,
    is_cut: bool = False,
) -> dict[str, Component]:
    """Write a component's graphs: in the weights' own type, in float32, and that one again for ONNX Runtime on CPUs.

    Its variants get the same, over its weights.

    Args:
        name: of the component.
        part: what it is.
        tensors: its parameters and their scales, where they lie in the bundle.
        precision: the element type of the bundle's weights.
        folder: the bundle's.
        rewrite: called with every graph before it is saved.
        is_cut: write graphs of its head, body and tail as well, which point into the same weights.

    Returns:
        The component's entry in the manifest, and those of its variants.

    Raises:
        CheckpointError: it has too few blocks to be cut.
    """
    whole = _entry(name, tensors, folder)
    if part.network is None:
        parameters = _count(part.shapes.values())
        names = tuple(info.name for info in tensors.values())
        return {name: msgspec.structs.replace(whole, tensors=names, parameters=parameters)}
    # Blocks are traced with weights as they are before they are quantized.
    plain = {key: replace(tensors[key], dtype=precision, shape=shape) for key, shape in part.parameters().items()}
    sizes = {info.name: info.nbytes for info in tensors.values()}
    found: dict[str, Component] = {}
    for compute in dict.fromkeys((precision, "float32")):
        plans = plans_of(name, part, compute, is_cut=is_cut)
        for (key, plan), assembled in zip(plans.items(), assemble_all([*plans.values()], plain, folder), strict=True):
            entry = found.get(key) or msgspec.structs.replace(whole, variant_of=None if key == name else name)
            found[key] = write_graphs(key, plan, assembled, entry, (compute, precision), folder, sizes, rewrite)
    return found


def write_graphs(
    name: str,
    plan: Plan,
    assembled: Assembled,
    entry: Component,
    types: tuple[str, str],
    folder: Path,
    sizes: Mapping[str, int],
    rewrite: Rewrite | None = None,
    suffix: str = "",
) -> Component:
    """Write a plan's graph, and that for ONNX Runtime on CPUs where it computes in float32.

    Args:
        name: of the component.
        plan: what was assembled.
        assembled: its model.
        entry: of the component in the manifest, with the graphs that were written before.
        types: the element type that it computes in, and that of the bundle's weights.
        folder: the bundle's.
        sizes: a tensor's name -> its bytes.
        rewrite: called with the graph before it is saved.
        suffix: of the files' names.

    Returns:
        The entry with these graphs.
    """
    (compute, precision), model, parameters = types, assembled.model, plan.parameters()
    if rewrite is not None:
        rewrite(model, compute, parameters)
    file = graph_name(name, compute, precision, suffix)
    ir.save(model, folder / file)
    graphs = {compute: file}
    if not entry.graphs:
        # What goes in and comes out is described once: of the graph that computes in the bundle's own precision.
        entry = msgspec.structs.replace(
            entry,
            inputs=assembled.inputs,
            outputs=assembled.outputs,
            parameters=_count(parameters.values()),
            weight_bytes=sum(sizes[tensor] for tensor in model.graph.initializers),
        )
    if compute == "float32":
        graphs[CPU_GRAPH] = graph_name(name, CPU_GRAPH, precision, suffix)
        ir.save(_for_cpu(model), folder / graphs[CPU_GRAPH])
    return msgspec.structs.replace(entry, graphs=entry.graphs | graphs)


def _for_cpu(model: ir.Model) -> ir.Model:
    """A graph that computes in float32, with what ONNX Runtime's CPU kernels do best; the model is changed."""
    FlashAttention()(model)
    IntegerProducts()(model)
    BlockProducts()(model)
    WeightsFirst()(model)
    # ONNX Runtime does that in time that grows with the square: 120 s for 24,000 nodes.
    passes.InlinePass()(model)
    initializers = model.graph.initializers
    # Each token has a scale of its own now.
    for name in [name for name, value in initializers.items() if name.endswith(INPUT_SCALE) and not value.uses()]:
        del initializers[name]
    # Blocks call dimensions alike that are not of one size.
    for value in (value for node in model.graph for value in node.outputs if not value.is_graph_output()):
        value.shape = value.type = None
    return model


def plans_of(name: str, part: Part, compute: str, *, is_cut: bool) -> dict[str, Plan]:
    """The plan of a component's graph, those of its variants and, where it is cut, those of the pieces of each.

    Args:
        name: of the component.
        part: what it is.
        compute: the element type that they compute in.
        is_cut: whether it is cut.

    Raises:
        CheckpointError: it has too few blocks to be cut.
    """
    plans: dict[str, Plan] = {}
    for key, own in ((name, part), *((f"{name}.{variant}", own) for variant, own in part.variants.items())):
        plan = record(own.build(getattr(torch, compute)), own.inputs, own.outputs, own.sizes)
        plans |= {key: plan} | (pieces_of(key, plan, own.cut) if is_cut else {})
    return plans


def pieces_of(name: str, plan: Plan, where: Cut | None) -> dict[str, Plan]:
    """The plans of a component's pieces, by the names that these have.

    Raises:
        CheckpointError: it has too few blocks to be cut.
    """
    return {f"{name}.{piece}": own for piece, own in (cut(plan, where) if where else {}).items()}


def _entry(name: str, tensors: Mapping[str, TensorInfo], folder: Path) -> Component:
    """What a component and its variants have in common: the files of their weights."""
    files = {info.file.relative_to(folder).as_posix() for info in tensors.values()}
    lora = lora_name(name) if lora_name(name) in files else None
    weights = (*sorted(files - {lora}), *filter(None, [lora]))
    base = base_name(name) if (folder / base_name(name)).exists() else None
    size = sum(info.nbytes for info in tensors.values())
    return Component(weights, weight_bytes=size, lora=lora, base=base)


def _count(shapes: Iterable[tuple[int, ...]]) -> int:
    """How many numbers there are in all."""
    return sum(math.prod(shape) for shape in shapes)
