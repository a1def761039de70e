"""Operators as plugins of TensorRT, compiled ahead of time: their kernels lie in the plan, which runs without Python.

Untested: what is here was never compiled into a plan, for that takes TensorRT proper and a GPU. Source:
``tensorrt.plugin``, https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/extending-custom-layers.html
"""

from __future__ import annotations

import contextlib
import inspect
import struct
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from zimgkit.engines.errors import BackendError
from zimgkit.engines.tensorrt import api as tensorrt_api
from zimgkit.plugins.definition import DOMAIN, Definition
from zimgkit.plugins.manifest import FOLDER, PTX, folder_of, read_manifest
from zimgkit.plugins.qk_norm_rope.definition import DEFINITIONS

if TYPE_CHECKING:
    import onnx

OPERATOR = "qk_norm_rope"
KERNELS = {"QKNormRope": "dense_qk_norm_rope", "JointQKNormRope": "joint_dense_qk_norm_rope"}
"""Function -> its kernel, whose parameters are its inputs, integers and its output."""
VERSION = "1"
TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
"""TensorRT's name of an element type -> ours."""


@cache
def register(module: ModuleType) -> None:
    """Register the operators with TensorRT, once.

    Args:
        module: ``tensorrt``.

    Raises:
        BackendError: this TensorRT takes no plugins that were compiled ahead of time.
    """
    plugin: Any = None
    with contextlib.suppress(ModuleNotFoundError):
        plugin = import_module(f"{module.__name__}.plugin")
    if not hasattr(plugin, "aot_impl"):
        known = f"{tensorrt_api.name(module)} {tensorrt_api.version(module)}"
        raise BackendError(f"{known} takes no plugins that were compiled ahead of time", "leave --plugins out")
    for definition in DEFINITIONS:
        name, describe, implement = f"{DOMAIN}::{definition.name}", *_functions(plugin, definition)
        plugin.register(name)(describe)
        plugin.aot_impl(name)(implement)


def call_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """Call the plugins wherever a model computes what they do.

    Args:
        model: its tensors may lie in files beside it.

    Returns:
        Another model.
    """
    import onnx_ir as ir
    from onnx import helper

    from zimgkit.plugins.matching import rewrite

    graph = ir.from_proto(model)
    rewrite(graph, DEFINITIONS)
    made = ir.to_proto(graph)
    # The parser prefers a function of the model to a plugin.
    kept = [function for function in made.functions if function.domain != DOMAIN or function.name not in KERNELS]
    del made.functions[:]
    made.functions.extend(kept)
    for nodes in (made.graph.node, *(function.node for function in made.functions)):
        for node in nodes:
            if node.domain == DOMAIN and node.op_type in KERNELS:
                names = {"plugin_namespace": DOMAIN, "plugin_version": VERSION}
                node.attribute.extend(helper.make_attribute(name, value) for name, value in names.items())
    return made


def _functions(plugin: Any, definition: Definition) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What tells the shape of a result, and what gives the kernel, as TensorRT calls them."""

    def describe(*tensors: Any, epsilon: float) -> Any:
        batch, heads, tokens, width = _sizes(tensors)
        return plugin.from_shape_expr((batch, heads, tokens, width), tensors[-4].dtype)

    def implement(*given: Any) -> tuple[str, str, Any, Any]:
        *tensors, epsilon, _outputs, _tactic = given
        return _kernel(plugin, definition, tensors, float(epsilon))

    tensors = dict.fromkeys(definition.inputs, plugin.TensorDesc)
    attributes = dict.fromkeys(definition.attributes, float)
    describe.__dict__["__signature__"] = _signature({**tensors, **attributes}, plugin.TensorDesc)
    # The types of these are optional.
    untyped = dict.fromkeys((*tensors, *attributes, "outputs", "tactic"), inspect.Parameter.empty)
    result = tuple[str, str, plugin.KernelLaunchParams, plugin.SymIntExprs]
    implement.__dict__["__signature__"] = _signature(untyped, result)
    return describe, implement


def _signature(types: dict[str, Any], result: Any) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=each) for name, each in types.items()]
    return inspect.Signature(parameters, return_annotation=result)


def _sizes(tensors: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Batch, heads, all tokens and width; the last four inputs are those of the operator without a context."""
    batch, tokens, heads, width = tensors[-4].shape_expr
    return batch, heads, tensors[0].shape_expr[1] + tokens if len(tensors) > 4 else tokens, width


def _kernel(plugin: Any, definition: Definition, tensors: Sequence[Any], epsilon: float) -> tuple[str, str, Any, Any]:
    """The name of the kernel, its PTX, how it is launched, and its integers."""
    batch, heads, tokens, width = _sizes(tensors)
    dtype = TYPES.get(tensors[-4].dtype.name, tensors[-4].dtype.name)
    kernel = read_manifest(OPERATOR).kernels.get(f"{KERNELS[definition.name]}.{dtype}")
    if kernel is None:
        raise BackendError(f"{definition.name} has no kernel for {dtype}", "leave --plugins out")
    multiple = next(each.multiple for each in kernel.parameters if each.name == "width")
    if not width.is_constant or width.constant_value() > kernel.limits["width"] or width.constant_value() % multiple:
        takes = f"multiples of {multiple} up to {kernel.limits['width']}"
        raise BackendError(f"{definition.name} has no kernel for heads of this width", f"it takes {takes}")
    values = {
        "context_tokens": tensors[0].shape_expr[1],
        "tokens": tokens,
        "batch": batch,
        "heads": heads,
        "width": width,
        # There are no numbers but integers: its bits are one.
        "epsilon_bits": struct.unpack("<i", struct.pack("<f", epsilon))[0],
    }
    wanted = [values[each.name] for each in kernel.parameters if each.type == "int32"]
    integers = plugin.SymIntExprs(len(wanted))
    for place, value in enumerate(wanted):
        integers[place] = plugin.SymInt32(value)
    compiled = kernel.compiled[PTX]
    grid = [plugin.cdiv(values[name], each) for name, each in kernel.grid]
    launch = plugin.KernelLaunchParams(*grid, block_x=compiled.threads, shared_mem=compiled.shared)
    text = (folder_of(OPERATOR) / FOLDER / compiled.file).read_text(encoding="ascii")
    return kernel.symbol, text, launch, integers
