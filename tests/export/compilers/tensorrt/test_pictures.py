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
RANGES["denoiser.conditions-at-zero"] = RANGES["denoiser.conditions"]


@pytest.mark.parametrize("name", RANGES)
def test_attention_is_fused(name, picture_bundle, tmp_path):
    """Also where there is a mask; that of heads of 80 and 128 was seen at the real widths."""
    for profiles in ([ranges] for ranges in RANGES[name]):
        graph = read_graph(picture_bundle, name, profiles)
        plan = compile_plan(graph, picture_bundle.component(name), profiles, tmp_path / "x.plan")
        assert len(graph.attentions) == 2
        assert plan.unfused == ()
        assert not plan.warnings
