"""The Qwen-Image networks against diffusers' transformer, in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from tests.reference import randomize
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.qwen_image import (
    QwenImageConditioner,
    QwenImageDenoiser,
    modulation_tensors,
    parts,
    read_config,
)
from zimgkit.export.networks.qwen_image_demo import CONFIGS
from zimgkit.export.networks.text_encoder import text_part
from zimgkit.runtime.families.qwen_image import QwenImage

TINY = {
    "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 3, "joint_attention_dim": 32, "axes_dims_rope": (8, 4, 4),
}  # fmt: skip
WIDE = TINY | {
    "in_channels": 64, "out_channels": 16, "num_layers": 3, "attention_head_dim": 64, "num_attention_heads": 4,
    "axes_dims_rope": (16, 24, 24), "joint_attention_dim": 24,
}  # fmt: skip


def modulation(reference, sigma, additional=None):
    """The rows the host's table would hold, taken from inside the reference."""
    time = reference.time_text_embed(torch.tensor([sigma]), torch.zeros(1), additional)
    rows = []
    for block in reference.transformer_blocks:
        rows += [block.img_mod(time), block.txt_mod(time)]
    rows.append(reference.norm_out.linear(reference.norm_out.silu(time)))
    width = reference.inner_dim
    return torch.cat([row.reshape(-1, width) for row in rows])


@pytest.mark.parametrize(
    ("config", "height", "width", "tokens", "batch", "sigma", "seed"),
    [
        (TINY, 4, 6, 5, 1, 1.0, 0),
        (TINY, 83, 83, 77, 1, 0.02, 1),
        (TINY, 1, 1, 1, 2, 0.5, 2),
        (TINY, 3, 50, 512, 1, 0.9897, 3),
        (WIDE, 10, 7, 12, 3, 0.4, 4),
        (WIDE, 16, 16, 200, 1, 0.7, 5),
    ],
)
@torch.inference_mode()
def test_matches_diffusers(config, height, width, tokens, batch, sigma, seed):
    reference = QwenImageTransformer2DModel(**config).eval()
    randomize(reference, seed)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, height * width, config["in_channels"], generator=generator)
    embeds = torch.randn(tokens, config["joint_attention_dim"], generator=generator)
    expected = reference(
        hidden_states=latents,
        encoder_hidden_states=embeds.expand(batch, -1, -1),
        timestep=torch.full((batch,), sigma),
        img_shapes=[[(1, height, width)]] * batch,
        return_dict=False,
    )[0].numpy()

    state = reference.state_dict()
    conditioner, denoiser = QwenImageConditioner(read_config(config)), QwenImageDenoiser(read_config(config))
    for network in (conditioner, denoiser):
        network.load_state_dict({name: state[name] for name in network.state_dict()})
    family = QwenImage(CONFIGS | {"transformer": config, "text_encoder": text_part(CONFIGS["text_encoder"])})
    inputs = family.conditioner_inputs(embeds.numpy())
    text = conditioner(torch.from_numpy(inputs["prompt_embeds"]))
    constants = family.denoiser_constants(text.numpy(), tokens, 16 * height, 16 * width)
    rows = modulation(reference, sigma).numpy()
    feeds = {**family.denoiser_inputs(latents.numpy()), **constants, "modulation": rows}
    names = ("hidden_states", "text", "modulation", "cos", "sin")
    found = denoiser(*(torch.from_numpy(feeds[name]) for name in names)).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_every_parameter_is_used_once():
    reference = {name: tuple(p.shape) for name, p in QwenImageTransformer2DModel(**TINY).state_dict().items()}
    names = [
        name
        for net in (kind(read_config(TINY)) for kind in (QwenImageConditioner, QwenImageDenoiser))
        for name in net.state_dict()
    ]
    tables = modulation_tensors(read_config(TINY))
    assert sorted([*names, *tables]) == sorted(reference)
    assert {name: reference[name] for name in tables} == tables


@pytest.mark.parametrize(
    "change",
    [{"use_additional_t_cond": True}, {"use_layer3d_rope": True}, {"patch_size": 1}, {"axes_dims_rope": (8, 4, 2)}],
)
def test_refuses_what_it_does_not_implement(change):
    with pytest.raises(CheckpointError, match=next(iter(change))):
        parts(TINY | change)
