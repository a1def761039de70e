"""Components and their variants in a bundle: one set of weights, and each graph computes what its network does."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from zimgkit.engines.bundle import CPU_GRAPH
from zimgkit.engines.onnxruntime.engine import open_engine as open_onnxruntime
from zimgkit.engines.torch.engine import open_engine as open_torch

SIZES = {
    "vision_encoder": ({"patches": 44, "windows": 4}, {"patches": 4, "windows": 1}),
    "text_encoder": ({"tokens": 21}, {"tokens": 1}),
    "text_encoder.pictures": ({"tokens": 21, "picture_tokens": 8}, {"tokens": 2, "picture_tokens": 1}),
    "denoiser": (
        {"batch": 1, "image_tokens": 12, "text_tokens": 5, "all_tokens": 17},
        {"batch": 3, "image_tokens": 1, "text_tokens": 1, "all_tokens": 2},
    ),
    "denoiser.conditions": (
        {"batch": 1, "image_tokens": 12, "condition_tokens": 30, "text_tokens": 5, "all_tokens": 47},
        {"batch": 3, "image_tokens": 1, "condition_tokens": 1, "text_tokens": 1, "all_tokens": 3},
    ),
}
SIZES["denoiser.masked"] = SIZES["denoiser"]
for _name in ("conditions-at-zero", "masked_conditions", "masked_conditions-at-zero"):
    SIZES[f"denoiser.{_name}"] = SIZES["denoiser.conditions"]
Z_IMAGE_SIZES = {
    "vision_encoder": ({"patches": 30}, {"patches": 1}),
    "denoiser": (
        {"batch": 1, "image_tokens": 64, "condition_tokens": 32, "caption_tokens": 64, "picture_tokens": 96},
        {"batch": 3, "image_tokens": 32, "condition_tokens": 96, "caption_tokens": 32, "picture_tokens": 64},
    ),
}
for _sizes in Z_IMAGE_SIZES["denoiser"]:
    _sizes["all_tokens"] = sum(length for name, length in _sizes.items() if name != "batch")
CASES = [*(("qwen-image", name, sizes) for name, sizes in SIZES.items())]
CASES += [("z-image", name, sizes) for name, sizes in Z_IMAGE_SIZES.items()]


def feeds_of(specs, sizes, seed):
    """Random inputs; indices name rows that there are, and each token and each window sees something."""
    rng, feeds = np.random.default_rng(seed), {}
    slots = specs["window_index"].shape[1] if "window_index" in specs else 0
    limits = {
        "input_ids": 300,
        "window_index": sizes.get("patches", 0),
        "patch_places": sizes.get("windows", 0) * slots,
    }
    limits["row_index"] = sizes.get("tokens", 0) + sizes.get("picture_tokens", 0)
    for name, spec in specs.items():
        shape = tuple(sizes.get(str(entry), entry) for entry in spec.shape)
        if spec.dtype == "int64":
            feeds[name] = rng.integers(0, limits[name], shape)
        elif spec.dtype == "bool":
            feeds[name] = rng.random(shape) < 0.5
            feeds[name][..., 0] = True
        else:
            feeds[name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


@pytest.mark.parametrize(("family", "name", "both"), CASES, ids=[f"{family} {name}" for family, name, _ in CASES])
@pytest.mark.usefixtures("torch_in_float32")
def test_what_each_graph_gives(family, name, both, picture_bundle, picture_networks):
    bundle, network = picture_bundle(family), picture_networks(family)[name]
    component = bundle.component(name)
    assert set(component.graphs) == {"bfloat16", "float32", CPU_GRAPH}
    for opened in (open_onnxruntime, open_torch):
        engine = opened(bundle, name, "cpu")
        for seed, sizes in enumerate(both):
            feeds = feeds_of(component.inputs, sizes, seed)
            (found,) = engine.run(feeds).values()
            expected = network(*map(torch.from_numpy, feeds.values())).numpy()
            assert found.shape == expected.shape
            assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
        engine.close()


def test_variants_have_no_weights_of_their_own(picture_bundle):
    bundle = picture_bundle("qwen-image")
    components = bundle.manifest.components
    assert set(components) == set(SIZES)
    for name in SIZES:
        whole, _, variant = name.partition(".")
        assert components[name].variant_of == (whole if variant else None)
        assert components[name].weights == components[whole].weights
        assert components[name].parameters == components[whole].parameters
    for file in bundle.root.glob("*.onnx"):
        assert file.stat().st_size < 150_000
        # What is called twice as well: compilers name layers so.
        names = [node.name for node in onnx.load(file, load_external_data=False).graph.node]
        assert len(set(names)) == len(names)
