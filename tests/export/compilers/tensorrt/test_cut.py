"""The pieces of a cut denoiser through a real TensorRT compiler, in every shape profile."""

from __future__ import annotations

import pytest

from zimgkit.engines.bundle import Bundle
from zimgkit.export.attachments.cut import PIECES
from zimgkit.export.build import build
from zimgkit.export.compilers.shape_profiles import ServedShapes, shape_profiles
from zimgkit.export.compilers.tensorrt.compiler import compile_plan
from zimgkit.export.compilers.tensorrt.graph import read_graph
from zimgkit.runtime.progress import silent

pytestmark = pytest.mark.usefixtures("compiler")

SERVED = (
    ServedShapes(sizes=((256, 256),)),
    ServedShapes(size_range=((128, 128), (256, 256), (512, 512)), max_prompt_tokens=300, batch=2),
)
STREAMS = {"z-image": ("head_x", "all_tokens"), "qwen-image": ("head_image", "image_tokens")}


@pytest.mark.parametrize("family", STREAMS)
def test_the_pieces_compile(family, checkpoint_of, tmp_path):
    bundle = build(str(checkpoint_of(family)), tmp_path / "bundle", precision="bf16", cut_denoiser=True)
    bundle = Bundle.open(bundle.root)
    for served in SERVED:
        found = shape_profiles(bundle.manifest, served)
        stream, dimension = STREAMS[family]
        assert bundle.component("denoiser.body").inputs[stream].shape[:2] == ("batch", dimension)
        (ranges,) = found["denoiser.body"]
        (whole,) = found["denoiser"]
        assert ranges.items() <= whole.items() and {"batch", dimension} <= ranges.keys()
        for piece in PIECES:
            name, file = f"denoiser.{piece}", tmp_path / f"{piece}.plan"
            graph = read_graph(bundle, name, found[name])
            plan = compile_plan(graph, bundle.component(name), found[name], file, report=silent)
            assert file.stat().st_size > bundle.component(name).weight_bytes / 2
            assert plan.unfused == ()
            # A tail takes the mask for its length alone.
            assert all("Input Tensor pad is unused or used only at compile-time" in text for text in plan.warnings)
            assert len(plan.warnings) == (name == "denoiser.tail" and family == "z-image")
            file.unlink()
