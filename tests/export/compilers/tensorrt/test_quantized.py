"""Every quantized graph through a real TensorRT compiler: it compiles, and 8 bits are multiplied in 8 bits."""

from __future__ import annotations

import pytest

from tests import quantized
from zimgkit.engines.bundle import Bundle
from zimgkit.export.compilers.shape_profiles import ServedShapes, shape_profiles
from zimgkit.export.compilers.tensorrt.compiler import compile_plan
from zimgkit.export.compilers.tensorrt.graph import read_graph

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.mark.parametrize("component", ["text_encoder", "denoiser"])
@pytest.mark.parametrize("precision", quantized.PRECISIONS)
@pytest.mark.parametrize("family", ["z-image", "qwen-image"])
def test_tiny(family, precision, component, quantized_of, tmp_path):
    bundle = Bundle.open(quantized_of(family, precision))
    ranges = shape_profiles(bundle.manifest, ServedShapes(size_range=((128, 128), (256, 256), (512, 512))))[component]
    graph = read_graph(bundle, component, ranges)
    scales = sum(name.endswith(".weight.scale") for name in bundle.tensors(component))
    assert len(graph.products) == (scales if precision in ("fp8", "int8") else 0)
    plan = compile_plan(graph, bundle.component(component), ranges, tmp_path / "x.plan")
    assert plan.unfused == ()
    assert plan.not_in_8_bits == ()
    assert not plan.warnings
