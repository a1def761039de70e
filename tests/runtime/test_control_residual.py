"""ControlNets with blocks of their own (InstantX): whole pictures against the pipelines of diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImagePipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_controlnet as reference_module

from tests import reference
from tests.references.cases import mask, picture
from zimgkit.engines.errors import UsageError
from zimgkit.export.build import build
from zimgkit.runtime import Pipeline

CALL = {"prompt": "a red cup on a table", "negative_prompt": "blurry", "true_cfg_scale": 3.0, "num_inference_steps": 3}
BOUND = 1e-4
"""On pixels from 0 to 1."""
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def nets(checkpoint, tmp_path_factory):
    """``union`` and ``inpainting``: folders of nets for the tiny checkpoint."""
    transformer = QwenImagePipeline.from_pretrained(checkpoint).transformer
    folder, found = tmp_path_factory.mktemp("nets"), {}
    for name, extra in (("union", 0), ("inpainting", 4)):
        config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
        kept = ("patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads")
        sizes = {key: config[key] for key in (*kept, "joint_attention_dim", "axes_dims_rope")}
        net = QwenImageControlNetModel(**sizes, num_layers=2, extra_condition_channels=extra)
        reference.randomize(net, 11 + extra)
        net.save_pretrained(folder / name)
        found[name] = folder / name
    return found


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of):
    return checkpoint_of("qwen-image", transformer={"num_layers": 5})


@pytest.fixture(scope="module")
def ours(checkpoint, nets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    bundle = build(str(checkpoint), folder, precision="fp32", controlnets=[*map(str, nets.values())])
    assert [control.name for control in bundle.manifest.controls] == ["union", "inpainting"]
    with Pipeline.open(folder) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _mean(monkeypatch):
    """Both diffusers pipelines draw the control picture's latents from the posterior; its mean is taken here."""
    monkeypatch.setattr(reference_module, "retrieve_latents", lambda given, generator: given.latent_dist.mode())
    kind = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution"
    monkeypatch.setattr(f"{kind}.sample", lambda self, generator=None: self.mode())


def theirs(kind, checkpoint, net, **call):
    parts = QwenImagePipeline.from_pretrained(checkpoint).components
    pipe = kind(**parts, controlnet=QwenImageControlNetModel.from_pretrained(net))
    pipe.set_progress_bar_config(disable=True)
    return pipe(**CALL, **call, output_type="np").images[0]


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((48, 64), {"controlnet_conditioning_scale": 0.8}),
        ((80, 48), {"control_guidance_start": 0.2, "control_guidance_end": 0.7, "controlnet_conditioning_scale": 1.5}),
    ],
)
def test_as_diffusers_draws_it(size, said, ours, checkpoint, nets):
    width, height = size
    given = {"width": width, "height": height, "control_image": picture(width, height, 4)}
    expected = theirs(
        QwenImageControlNetPipeline, checkpoint, nets["union"], **given, **said,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    found = ours(**CALL, **given, **said, seed=5, output_type="np").images[0]
    assert np.abs(found - expected).max() < BOUND
    plain = ours(**CALL, width=width, height=height, seed=5, output_type="np").images[0]
    assert np.abs(found - plain).max() > 0.05


def test_as_diffusers_fills_a_hole(ours, checkpoint, nets):
    size, image, hole = {"width": 64, "height": 48}, picture(64, 48, 6), mask(100, 90, (0.2, 0.1, 0.7, 0.8))
    expected = theirs(
        QwenImageControlNetInpaintPipeline, checkpoint, nets["inpainting"], **size, control_image=image,
        control_mask=hole, controlnet_conditioning_scale=0.9, generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    found = ours(
        **CALL, **size, control_image={"inpainting": image}, control_mask={"inpainting": hole},
        controlnet_conditioning_scale=0.9, seed=5, output_type="np",
    ).images[0]  # fmt: skip
    assert np.abs(found - expected).max() < BOUND


def test_they_act_alone(ours):
    image = picture(48, 48, 1)
    both = [{"name": "union", "image": image}, {"name": "inpainting", "image": image, "mask": image}]
    with pytest.raises(UsageError, match="the ControlNets union and inpainting cannot act together; give one of them"):
        ours(**CALL, width=48, height=48, controls=both)
