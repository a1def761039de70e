from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, QwenImagePipeline, ZImageTransformer2DModel

from zimgkit.engines.errors import CheckpointError
from zimgkit.runtime.diffusion.latents import denormalize, normalize, pack, unpack, vae_normalization

SIZES = [(2, 2), (4, 6), (8, 12), (166, 166), (30, 2), (2, 46)]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels", [4, 16])
def test_qwen_image(height, width, batch, channels):
    latents = noise(batch, channels, height, width)
    expected = QwenImagePipeline._pack_latents(torch.from_numpy(latents), batch, channels, height, width)
    tokens = pack(latents, "c ph pw")
    assert tokens.shape == (batch, height * width // 4, 4 * channels)
    np.testing.assert_array_equal(tokens, expected.numpy())
    back = QwenImagePipeline._unpack_latents(torch.from_numpy(tokens), height * 8, width * 8, 8)
    np.testing.assert_array_equal(unpack(tokens, "c ph pw", height, width), back[:, :, 0].numpy())


@pytest.fixture(scope="module")
def z_image():
    with torch.device("meta"):
        return ZImageTransformer2DModel(
            all_patch_size=(2,), all_f_patch_size=(1,), dim=48, n_layers=1, n_refiner_layers=1, n_heads=3,
            n_kv_heads=3, cap_feat_dim=16, axes_dims=[8, 4, 4],
        )  # fmt: skip


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("batch", [1, 3])
def test_z_image(z_image, height, width, batch):
    latents = noise(batch, 16, height, width)
    tokens = pack(latents, "ph pw c")
    for sample, ours in zip(torch.from_numpy(latents), tokens, strict=True):
        patches, _, _ = z_image._patchify_image(sample[:, None], 2, 1)
        np.testing.assert_array_equal(ours, patches.numpy())
    sizes = [(1, height, width)] * batch
    back = torch.stack(z_image.unpatchify(list(torch.from_numpy(tokens)), sizes, 2, 1))
    np.testing.assert_array_equal(unpack(tokens, "ph pw c", height, width), back[:, :, 0].numpy())


@pytest.mark.parametrize("layout", ["c ph pw", "ph pw c"])
def test_unpack_undoes_pack(layout):
    for seed, (height, width) in enumerate(SIZES):
        latents = noise(2, 16, height, width, seed=seed)
        np.testing.assert_array_equal(unpack(pack(latents, layout), layout, height, width), latents)


@pytest.mark.parametrize("seed", range(3))
def test_qwen_image_vae(seed):
    config = dict(AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1], num_res_blocks=1).config)
    latents = noise(2, 16, 6, 4, seed=seed)
    frames = torch.from_numpy(latents)[:, :, None]
    # As written in QwenImagePipeline.__call__ and QwenImageImg2ImgPipeline._encode_vae_image.
    mean = torch.tensor(config["latents_mean"]).view(1, 16, 1, 1, 1)
    reciprocal = 1.0 / torch.tensor(config["latents_std"]).view(1, 16, 1, 1, 1)
    normalization = vae_normalization(config)
    decoded = denormalize(latents, normalization)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, (frames / reciprocal + mean)[:, :, 0].numpy())
    np.testing.assert_array_equal(normalize(latents, normalization), ((frames - mean) * reciprocal)[:, :, 0].numpy())


@pytest.mark.parametrize("config", [{"scaling_factor": 0.3611, "shift_factor": 0.1159}, {"scaling_factor": 0.18215}])
def test_autoencoder_kl(config):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8, latent_channels=16, **config)
    latents = noise(2, 16, 6, 4)
    x, shift = torch.from_numpy(latents), vae.config.shift_factor or 0.0
    normalization = vae_normalization(dict(vae.config))
    np.testing.assert_array_equal(denormalize(latents, normalization), (x / vae.config.scaling_factor + shift).numpy())
    np.testing.assert_array_equal(normalize(latents, normalization), ((x - shift) * vae.config.scaling_factor).numpy())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"shift_factor": 0.1},
        {"scaling_factor": 0.0},
        {"scaling_factor": None},
        {"scaling_factor": "a"},
        {"latents_mean": [0.0, 1.0], "latents_std": [1.0]},
        {"latents_mean": [0.0], "latents_std": [-1.0]},
        {"latents_mean": [float("nan")], "latents_std": [1.0]},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refuses_other_configs(config):
    with pytest.raises(CheckpointError, match="vae"):
        vae_normalization(config)
