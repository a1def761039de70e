"""A denoiser with ControlNets: what is inserted, and that it compiles."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from zimgkit.engines.base import open_engine
from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import BackendError
from zimgkit.engines.tensorrt.plan import choose_plan
from zimgkit.export.build import build
from zimgkit.export.compilers.shape_profiles import ServedShapes, shape_profiles
from zimgkit.export.quality.verify import refuse_failures, verification_text, verify

TOKENS, TEXT = 24, 5


@pytest.fixture(scope="module")
def bundle(recorded_bundle_of):
    return Bundle.open(recorded_bundle_of("qwen-image-control"))


def feeds_of(bundle, component):
    """Inputs of a denoiser, the same for all that have them."""
    sizes = {"batch": 1, "image_tokens": TOKENS, "text_tokens": TEXT, "all_tokens": TOKENS + TEXT}
    found = {}
    for name, spec in bundle.component(component).inputs.items():
        shape = [sizes[side] if isinstance(side, str) else side for side in spec.shape]
        rng = np.random.default_rng([*name.encode()])
        found[name] = rng.standard_normal(shape).astype(np.float32)
    return found


def run(bundle, component, **changes):
    engine = open_engine(bundle, component)
    try:
        return engine.run(feeds_of(bundle, component) | changes)["velocity"]
    finally:
        engine.close()


def test_a_net_at_0_is_the_plain_denoiser(bundle):
    zero = np.zeros(1, np.float32)
    plain = run(bundle, "denoiser")
    assert (run(bundle, "denoiser.control.canny", **{"scale.canny": zero}) == plain).all()
    none = {f"scale.{name}": zero for name in ("canny", "depth", "inpaint")}
    together = run(bundle, "denoiser.control", **none)
    assert (together == plain).all()
    one = run(bundle, "denoiser.control", **none | {"scale.canny": np.full(1, 0.7, np.float32)})
    alone = run(bundle, "denoiser.control.canny", **{"scale.canny": np.full(1, 0.7, np.float32)})
    np.testing.assert_allclose(one, alone, atol=1e-5)
    assert np.abs(alone - plain).max() > 0.01


def test_its_graph_is_small_and_its_weights_are_those_that_are_there(bundle):
    component = bundle.component("denoiser.control")
    assert component.variant_of == "denoiser"
    assert {*bundle.component("denoiser").weights} < {*component.weights}
    assert all(bundle.file(file).stat().st_size < 300_000 for file in component.graphs.values())
    own = {name for name in bundle.tensors("denoiser.control") if name.startswith("control.depth.")}
    assert len(own) == 14 and "control.depth.controlnet_blocks.1.output_proj.weight" in own


def test_the_check_of_a_bundle_knows_them(bundle, recorded_checkpoint_of):
    result = verify(bundle.root, str(recorded_checkpoint_of("qwen-image-control")))
    refuse_failures(result)
    for name in ("canny", "depth", "inpaint"):
        entry = result["components"][f"denoiser.control.{name}"]
        assert (entry["tensors"], entry["different"]) == (14, 0)
        assert entry["relative_max_error"] < 1e-5
    assert "denoiser.control.canny   14 of 14 weights are the checkpoint's" in verification_text(result)


def test_what_compiled_engines_serve(bundle):
    served = ServedShapes(size_range=((128, 128), (256, 256), (512, 512)), max_prompt_tokens=300, batch=2)
    found = shape_profiles(bundle.manifest, served)
    assert found["denoiser.control"] == found["denoiser.control.canny"] == found["denoiser"]


@pytest.mark.usefixtures("compiler")
def test_it_compiles(recorded_checkpoint_of, tmp_path):
    from zimgkit.export.compilers.tensorrt.compiler import compile_plan
    from zimgkit.export.compilers.tensorrt.graph import read_graph

    checkpoint = recorded_checkpoint_of("qwen-image-control")
    nets = [str(checkpoint / f"controlnet/{name}.safetensors") for name in ("canny", "inpaint")]
    bundle = build(str(checkpoint), tmp_path / "bundle", precision="bf16", controlnets=nets)
    served = ServedShapes(size_range=((128, 128), (256, 256), (512, 512)), max_prompt_tokens=300, batch=2)
    name = "denoiser.control"
    ranges = shape_profiles(bundle.manifest, served)[name]
    plan = compile_plan(read_graph(bundle, name, ranges), bundle.component(name), ranges, tmp_path / "x.plan")
    assert plan.unfused == () and not plan.warnings
    assert plan.file.stat().st_size > bundle.component(name).weight_bytes / 2


def test_a_bundle_whose_net_is_not_compiled_says_how(bundle):
    with pytest.raises(BackendError, match=r"no TensorRT engine of denoiser.control.canny; .*zimg-export compile"):
        choose_plan(bundle, "denoiser.control.canny", "tensorrt", "11.4", "sm90")


def test_what_a_manifest_says_of_a_net_has_to_be_there(bundle):
    manifest = bundle.manifest
    first = manifest.controls[0]
    for change in ({"source": "elsewhere"}, {"component": "denoiser.control.pose"}, {"name": "depth"}):
        controls = (msgspec.structs.replace(first, **change), *manifest.controls[1:])
        with pytest.raises(ValueError, match=r"no source, or no component|two controls have one name"):
            msgspec.structs.replace(manifest, controls=controls)
