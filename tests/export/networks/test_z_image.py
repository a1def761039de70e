"""The Z-Image networks against diffusers' transformer, in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel

from tests.reference import randomize
from zimgkit.engines.errors import CheckpointError
from zimgkit.export.networks.z_image import ZImageConditioner, ZImageDenoiser, parts, read_config
from zimgkit.export.networks.z_image_demo import CONFIGS
from zimgkit.runtime.families.z_image import ZImage, network_time, time_embedding

TINY = {
    "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 48, "n_layers": 2,
    "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 16,
    "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [8, 4, 4], "axes_lens": [1536, 512, 512],
}  # fmt: skip
WIDE = TINY | {
    "dim": 320,
    "n_heads": 5,
    "n_kv_heads": 5,
    "axes_dims": [16, 24, 24],
    "n_refiner_layers": 2,
    "cap_feat_dim": 40,
}


def run(config, reference, latents, prompt_embeds, sigma):
    """The velocity by our networks and host functions, from the reference's weights."""
    state = reference.state_dict()
    networks = ZImageConditioner(read_config(config)), ZImageDenoiser(read_config(config))
    for network in networks:
        network.load_state_dict({name: state[name] for name in network.state_dict()})
    conditioner, denoiser = networks
    family = ZImage(CONFIGS | {"transformer": config})
    inputs = family.conditioner_inputs(prompt_embeds)
    caption = conditioner(*(torch.from_numpy(value) for value in inputs.values()))
    height, width = 8 * latents.shape[2], 8 * latents.shape[3]
    constants = family.denoiser_constants(caption.numpy(), len(prompt_embeds), height, width)
    sinusoids = time_embedding(network_time(np.array([sigma], np.float32)), config["t_scale"])
    feeds = {**family.denoiser_inputs(latents), **constants, "sinusoids": sinusoids}
    names = ("hidden_states", "sinusoids", "caption", "cos", "sin", "pad")
    output = denoiser(*(torch.from_numpy(feeds[name]) for name in names))
    return family.velocity(output.numpy(), latents)


@pytest.mark.parametrize(
    ("config", "height", "width", "tokens", "batch", "sigma", "seed"),
    [
        (TINY, 8, 12, 20, 1, 1.0, 0),
        (TINY, 166, 166, 33, 1, 0.3, 1),  # 83 x 83 tokens, which needs pads
        (TINY, 2, 2, 1, 3, 0.95454544, 2),
        (TINY, 16, 32, 64, 2, 0.5, 3),
        (TINY, 64, 10, 512, 1, 0.02, 4),
        (WIDE, 20, 6, 31, 2, 0.7, 5),
        (WIDE, 8, 8, 96, 1, 0.9, 6),
    ],
)
@torch.inference_mode()
def test_matches_diffusers(config, height, width, tokens, batch, sigma, seed):
    reference = ZImageTransformer2DModel(**config).eval()
    randomize(reference, seed)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 16, height, width, generator=generator)
    embeds = torch.randn(tokens, config["cap_feat_dim"], generator=generator)
    time = torch.full((batch,), (1000 - np.float32(sigma) * 1000) / 1000)
    expected = reference(list(latents.unsqueeze(2)), time, [embeds] * batch, return_dict=False)[0]
    expected = -torch.stack(expected).squeeze(2).numpy()
    found = run(config, reference, latents.numpy(), embeds.numpy(), sigma)
    assert found.shape == expected.shape
    # Seven thousand tokens are summed in another order on each kind of CPU.
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@torch.inference_mode()
def test_every_parameter_is_used_once():
    names = [
        name
        for net in (kind(read_config(TINY)) for kind in (ZImageConditioner, ZImageDenoiser))
        for name in net.state_dict()
    ]
    assert sorted(names) == sorted(ZImageTransformer2DModel(**TINY).state_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"all_patch_size": (4,)},
        {"qk_norm": False},
        {"siglip_feat_dim": 1152},
        {"n_kv_heads": 1},
        {"axes_dims": [8, 4, 2]},
    ],
)
def test_refuses_what_it_does_not_implement(change):
    with pytest.raises(CheckpointError, match=next(iter(change))):
        parts(TINY | change)
