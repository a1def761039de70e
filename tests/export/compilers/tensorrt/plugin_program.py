"""Registers our plugins with TensorRT's own Python, and asks them what a compiler would; a program of its own.

Dimensions are numbers here: an imitation of TensorRT's expressions, which only a compilation has. ``launch JOINT
TYPE EPSILON BATCH TOKENS CONTEXT HEADS WIDTH`` prints what a plugin says, ``parse BUNDLE`` what the parser says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tensorrt_bindings as trt

from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import BackendError
from zimgkit.engines.tensorrt import api
from zimgkit.export.compilers.tensorrt import compiler
from zimgkit.export.compilers.tensorrt.graph import read_graph
from zimgkit.export.compilers.tensorrt.plugins import register

sys.modules["tensorrt"] = trt  # As it calls itself.
OPERATIONS = {
    trt.DimensionOperation.SUM: lambda a, b: a + b,
    trt.DimensionOperation.PROD: lambda a, b: a * b,
    trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
}


class Number(trt.IDimensionExpr):
    """A dimension that is known."""

    value: int

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


def number(value: int) -> Number:
    made = Number.__new__(Number)  # Its class has no constructor.
    made.value = value
    return made


class Builder:
    """Of expressions."""

    def constant(self, value: int) -> Number:
        return number(value)

    def operation(self, kind: Any, one: Number, other: Number) -> Number:
        return number(OPERATIONS[kind](one.value, other.value))


def launch(joint: str, dtype: str, epsilon: str, *sizes: str) -> dict[str, Any]:
    """What a plugin says of tensors of these sizes: the shape of its result, its kernel, how it is launched."""
    register(trt)
    from tensorrt_bindings.plugin import _lib, _plugin_class, _tensor

    batch, tokens, context, heads, width = map(int, sizes)
    kind, table = getattr(trt.DataType, dtype), (batch, tokens + context * int(joint), width // 2)
    own = [((batch, tokens, heads, width), kind), ((width,), kind), (table, trt.float32), (table, trt.float32)]
    before = [((batch, context, heads, width), kind), ((width,), kind)] if int(joint) else []
    definition = _lib.QDP_REGISTRY["zimg::JointQKNormRope" if int(joint) else "zimg::QKNormRope"]
    plugin = _plugin_class._TemplateAOTPlugin(*definition.plugin_id.split("::")[::-1], definition.num_outputs)
    names = definition.aot_impl_attr_names
    plugin.init(definition.register_func, {"epsilon": float(epsilon)}, names, definition.aot_impl_func, [], None)
    inputs = [*before, *own]
    types = plugin.get_output_data_types([kind for _, kind in inputs], [len(shape) for shape, _ in inputs])
    _tensor.SymIntExpr._exprBuilder = Builder()
    descriptions = []
    for shape, each in inputs:
        description = _tensor.TensorDesc()
        description.dtype, description.shape_expr = each, _tensor.ShapeExprs.from_tuple(shape)
        descriptions.append(description)
    result = definition.register_func(*descriptions, epsilon=float(epsilon))
    symbol, text, params, integers = definition.aot_impl_func(*descriptions, float(epsilon), (result,), None)
    return {
        "types": [each.name for each in types],
        "shape": [size._expr.value for size in result.shape_expr],
        "symbol": symbol,
        "text": text,
        "grid": [each._expr.value for each in (params.grid_x, params.grid_y, params.grid_z)],
        "block": [each._expr.value for each in (params.block_x, params.block_y, params.block_z)],
        "shared": params.shared_mem._expr.value,
        "integers": [each._expr.value for each in integers],
    }


def parse(path: str) -> str:
    """What the parser says of a bundle's denoiser.

    The compiler of the tests knows no networks that prefer such plugins, so this one does not.
    """
    bundle = Bundle.open(Path(path), verify=False)
    register(trt)
    log = api.make_logger(trt)
    network = trt.Builder(log).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    graph = read_graph(bundle, "denoiser", plugins=True)
    try:
        compiler._parse(trt.OnnxParser(network, log), graph, log, compiler.CompilerOptions(plugins=True))
    except BackendError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    print(json.dumps({"launch": launch, "parse": parse}[sys.argv[1]](*sys.argv[2:])))
