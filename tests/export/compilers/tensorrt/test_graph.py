"""What TensorRT's parser is given, against ``onnx`` and ``safetensors``."""

from __future__ import annotations

import json
import mmap
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import inliner
from safetensors.torch import load_file

from tests import handmade
from zimgkit.engines.bundle import Bundle, Component
from zimgkit.engines.errors import BundleError
from zimgkit.export.compilers.shape_profiles import ServedShapes, shape_profiles
from zimgkit.export.compilers.tensorrt.graph import read_graph

ATTENTIONS = {
    "z-image": {"text_encoder": 2, "conditioner": 1, "denoiser": 3, "vae_encoder": 1, "vae_decoder": 1},
    "qwen-image": {"text_encoder": 2, "conditioner": 0, "denoiser": 2, "vae_encoder": 1, "vae_decoder": 1},
}
"""Of the tests' pipelines. Z-Image reads the second-to-last of three layers; its denoiser has a refiner."""


@pytest.fixture(scope="module", params=list(ATTENTIONS))
def bundle(request, bundle_of):
    return Bundle.open(bundle_of(request.param, "bf16", tasks=("inpaint",)))


def components(bundle):
    return [name for name, component in bundle.manifest.components.items() if component.graphs]


def test_every_attention_may_be_computed_in_parts(bundle):
    for name, expected in ATTENTIONS[bundle.manifest.family].items():
        graph = read_graph(bundle, name)
        flat = inliner.inline_local_functions(onnx.load_from_string(graph.model))
        found = [node for node in flat.graph.node if node.op_type == "Attention"]
        assert len(found) == len(graph.attentions) == len(set(graph.attentions)) == expected
        for node in found:
            (mark,) = [entry for entry in node.attribute if entry.name == "TRT_decomposable"]
            assert (mark.type, mark.i) == (onnx.AttributeProto.INT, 1)
        calls = {node.name for node in onnx.load_from_string(graph.model).graph.node}
        assert calls.issuperset(graph.attentions)


def test_only_that_is_changed(bundle):
    for name in components(bundle):
        stored = onnx.load(bundle.file(bundle.component(name).graphs["bfloat16"]), load_external_data=False)
        given = onnx.load_from_string(read_graph(bundle, name).model)
        for function in given.functions:
            for node in function.node:
                kept = [entry for entry in node.attribute if entry.name != "TRT_decomposable"]
                del node.attribute[:]
                node.attribute.extend(kept)
        assert given == stored


def test_weights_are_the_files_own_bytes(bundle):
    for name in components(bundle):
        graph, component = read_graph(bundle, name), bundle.component(name)
        expected = {}
        for file in component.weights:
            expected |= load_file(bundle.file(file))
        initializers = {entry.name: entry for entry in onnx.load_from_string(graph.model).graph.initializer}
        assert set(graph.weights) == set(initializers)
        assert sum(weight.size for weight in graph.weights.values()) == component.parameters
        for key, weight in graph.weights.items():
            theirs = expected[key]
            assert list(weight.shape) == list(theirs.shape) == list(initializers[key].dims)
            assert weight.tobytes() == theirs.view(torch.uint8).numpy().tobytes()
            assert not initializers[key].raw_data


def test_weights_are_mapped_and_not_read(bundle):
    graph = read_graph(bundle, "denoiser")
    for weight in graph.weights.values():
        base = weight
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base, mmap.mmap)
        assert weight.flags.c_contiguous and not weight.flags.writeable
    assert len(graph.model) < 200_000


@pytest.mark.parametrize(
    ("shapes", "fixed"),
    [
        (ServedShapes(sizes=((256, 256),)), {"batch": 1, "image_tokens": 256, "height": 32, "width": 32}),
        (ServedShapes(sizes=((256, 256),), batch=2), {"image_tokens": 256, "height": 32, "width": 32}),
        # Two sizes of one height; and two of as many tokens.
        (ServedShapes(sizes=((256, 256), (512, 256))), {"batch": 1, "height": 32}),
        (ServedShapes(sizes=((256, 512), (512, 256))), {"batch": 1, "image_tokens": 512}),
        (ServedShapes(size_range=((256, 256), None, (512, 512))), {"batch": 1}),
        (ServedShapes(sizes=((256, 256),), max_prompt_tokens=1),
         {"batch": 1, "image_tokens": 256, "height": 32, "width": 32, "text_tokens": 1, "caption_tokens": 32}),
    ],
)  # fmt: skip
def test_dimensions_of_one_length_become_static(bundle, shapes, fixed):
    ranges = shape_profiles(bundle.manifest, shapes)
    fixed = fixed | {f"image_{side}": 8 * fixed[side] for side in ("height", "width") if side in fixed}
    if shapes.max_prompt_tokens == 1:
        drop = bundle.manifest.text.drop
        fixed = fixed | {"tokens": drop + 1, "all_tokens": 256 + (32 if bundle.manifest.family == "z-image" else 1)}
    for name in components(bundle):
        graph = onnx.load_from_string(read_graph(bundle, name, ranges[name]).model).graph
        for value in graph.input:
            expected = [fixed.get(dim, dim) for dim in bundle.component(name).inputs[value.name].shape]
            found = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            assert found == expected, (name, value.name)


def test_a_weight_that_is_missing(bundle, tmp_path):
    root = shutil.copytree(bundle.root, tmp_path / "bundle")
    path = root / bundle.component("conditioner").graphs["bfloat16"]
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].name = "nowhere.weight"
    path.write_bytes(model.SerializeToString())
    broken = Bundle.open(root, verify=False)
    with pytest.raises(
        BundleError, match=r"conditioner.onnx takes nowhere.weight, which is in none of its weight files; build"
    ):
        read_graph(broken, "conditioner")


def test_a_file_that_is_no_graph(tmp_path):
    nets = {"net": Component((), {"float32": "net.onnx"})}
    root = handmade.write_bundle(tmp_path / "bundle", {"net.onnx": json.dumps({}).encode() * 9}, components=nets)
    with pytest.raises(BundleError, match=r"net.onnx is not an ONNX model \(.*\); build the bundle again"):
        read_graph(Bundle.open(root, verify=False), "net")


def test_a_component_that_is_not_there(bundle):
    with pytest.raises(BundleError, match="has no component 'nothing', only text_encoder, conditioner,"):
        read_graph(bundle, "nothing")
