"""Everything that reads pictures through a real TensorRT compiler: windows, masks, and lengths that are in no name."""

from __future__ import annotations

import pytest

from zimgkit.export.compilers.tensorrt.compiler import compile_plan
from zimgkit.export.compilers.tensorrt.graph import read_graph

pytestmark = pytest.mark.usefixtures("compiler")

ONE_PICTURE = {"batch": (1, 1, 1), "image_tokens": (256, 256, 256), "text_tokens": (40, 40, 40)}
RANGES = {
    "vision_encoder": [
        {"patches": (16, 196, 5476), "windows": (1, 16, 400)},
        {"patches": (196,) * 3, "windows": (16,) * 3},
    ],
    "text_encoder.pictures": [{"tokens": (66, 300, 2000), "picture_tokens": (1, 196, 1369)}],
    "denoiser.conditions": [
        {**ONE_PICTURE, "condition_tokens": (256,) * 3, "all_tokens": (552,) * 3},
        {
            "batch": (1, 1, 2), "image_tokens": (64, 256, 1024), "condition_tokens": (1, 256, 3072),
            "text_tokens": (1, 128, 2000), "all_tokens": (66, 640, 6096),
        },
    ],
    "denoiser.masked": [
        {**ONE_PICTURE, "all_tokens": (296,) * 3},
        {
            "batch": (1, 1, 2), "image_tokens": (64, 256, 1024), "text_tokens": (1, 128, 900),
            "all_tokens": (65, 384, 1924),
        },
    ],
}  # fmt: skip
for _name in ("conditions-at-zero", "masked_conditions", "masked_conditions-at-zero"):
    RANGES[f"denoiser.{_name}"] = RANGES["denoiser.conditions"]
Z_IMAGE_RANGES = {
    "vision_encoder": [{"patches": (1, 200, 256)}],
    "denoiser": [
        {
            "batch": (1, 1, 2), "image_tokens": (32, 256, 1024), "condition_tokens": (32, 256, 3072),
            "caption_tokens": (64, 128, 608), "picture_tokens": (64, 288, 800), "all_tokens": (192, 928, 5504),
        },
    ],
}  # fmt: skip
CASES = [*(("qwen-image", *item) for item in RANGES.items()), *(("z-image", *item) for item in Z_IMAGE_RANGES.items())]


@pytest.mark.parametrize(("family", "name", "each"), CASES, ids=[f"{family} {name}" for family, name, _ in CASES])
def test_attention_is_fused(family, name, each, picture_bundle, tmp_path):
    """Also where there is a mask; that of heads of 80 and 128 was seen at the real widths."""
    bundle = picture_bundle(family)
    for profiles in ([ranges] for ranges in each):
        graph = read_graph(bundle, name, profiles)
        plan = compile_plan(graph, bundle.component(name), profiles, tmp_path / "x.plan")
        assert len(graph.attentions) == (3 if (family, name) == ("z-image", "denoiser") else 2)
        assert plan.unfused == ()
        assert not plan.warnings
