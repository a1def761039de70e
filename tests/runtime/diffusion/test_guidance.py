"""The rules are checked inside diffusers' own pipelines, run with a small function in the transformer's place."""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, ZImagePipeline

from zimgkit.runtime.diffusion.guidance import acts, norm_capped_guidance, norm_preserving_guidance
from zimgkit.runtime.diffusion.schedule import euler_step, flow_match_sigmas, linspace_float32, read_scheduler
from zimgkit.runtime.families import qwen_image, z_image
from zimgkit.runtime.families.qwen_image import QwenImage
from zimgkit.runtime.families.z_image import ZImage

QWEN_SCHEDULER = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
Z_SCHEDULER = {"shift": 3.0}


def network(latents, time, prompt):
    """Stands for a transformer: some function of its three inputs, in torch."""
    return torch.sin(1.7 * latents + prompt.mean() + 3 * time) + 0.3 * prompt.std() * latents


class Stub(torch.nn.Module):
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, in_channels):
        super().__init__()
        self.in_channels = in_channels
        self.config = SimpleNamespace(in_channels=in_channels, guidance_embeds=False)

    @contextlib.contextmanager
    def cache_context(self, name):
        yield


class ZStub(Stub):
    def forward(self, latents, times, prompts, **_):
        return ([network(*inputs) for inputs in zip(latents, times, prompts, strict=True)],)


class QwenStub(Stub):
    def forward(self, hidden_states, timestep, encoder_hidden_states, **_):
        inputs = zip(hidden_states, timestep, encoder_hidden_states, strict=True)
        return (torch.stack([network(*sample) for sample in inputs]),)


def embeds(rng, batch):
    return torch.from_numpy(rng.standard_normal((batch, 5, 8), np.float32))


def predict(latents, time, prompts):
    predictions = [network(torch.from_numpy(x), torch.tensor(time), p) for x, p in zip(latents, prompts, strict=True)]
    return torch.stack(predictions).numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 4.0, 7.5])
@pytest.mark.parametrize("batch", [1, 2])
def test_qwen_image_pipeline(seed, scale, batch):
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((batch, 6, 16), np.float32)
    positive, negative = embeds(rng, batch), embeds(rng, batch)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(QWEN_SCHEDULER)
    pipeline = QwenImagePipeline(scheduler, None, None, None, QwenStub(16))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        true_cfg_scale=scale,
        latents=torch.from_numpy(latents),
        height=32,
        width=48,
        num_inference_steps=4,
        output_type="latent",
    ).images
    sigmas = flow_match_sigmas(4, read_scheduler(QWEN_SCHEDULER), mu=scheduler_mu(6))
    for sigma, following in itertools.pairwise(sigmas):
        velocity = predict(latents, qwen_image.network_time(sigma), positive)
        if QwenImage.is_guided(scale):
            velocity = norm_preserving_guidance(
                velocity, predict(latents, qwen_image.network_time(sigma), negative), scale
            )
        assert velocity.dtype == np.float32
        latents = euler_step(latents, velocity, sigma, following)
    np.testing.assert_allclose(latents, expected.numpy(), rtol=0, atol=5e-6)


def scheduler_mu(tokens):
    return 0.5 + (tokens - 256) * (0.9 - 0.5) / (8192 - 256)


@pytest.mark.parametrize(("seed", "scale"), [(0, 0.0), (1, 0.5), (2, 5.0)])
@pytest.mark.parametrize("normalization", [False, True, 0.4, 1.3, -1.0])
@pytest.mark.parametrize("truncation", [1.0, 0.5, 0.0, -0.5, 2.0])
def test_z_image_pipeline(seed, scale, normalization, truncation):
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((2, 16, 4, 6), np.float32)
    positive, negative = embeds(rng, 2), embeds(rng, 2)
    pipeline = ZImagePipeline(FlowMatchEulerDiscreteScheduler.from_config(Z_SCHEDULER), None, None, None, ZStub(16))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=list(positive),
        negative_prompt_embeds=list(negative),
        guidance_scale=scale,
        cfg_normalization=normalization,
        cfg_truncation=truncation,
        latents=torch.from_numpy(latents),
        height=32,
        width=48,
        num_inference_steps=5,
        output_type="latent",
    ).images
    sigmas = flow_match_sigmas(5, read_scheduler(Z_SCHEDULER), mu=None, sigmas=linspace_float32(5))
    for sigma, following in itertools.pairwise(sigmas):
        output = predict(latents, z_image.network_time(sigma), positive)
        if ZImage.is_guided(scale) and acts(sigma, truncation):
            output = norm_capped_guidance(
                output, predict(latents, z_image.network_time(sigma), negative), scale, normalization
            )
        assert output.dtype == np.float32
        latents = euler_step(latents, -output, sigma, following)
    np.testing.assert_allclose(latents, expected.numpy(), rtol=0, atol=5e-6)


def test_truncation_at_its_edge():
    """With shift 3 and 8 steps the reference's 1 - sigma passes 0.25 exactly; it is not above it."""
    sigmas = flow_match_sigmas(8, read_scheduler(Z_SCHEDULER), mu=None, sigmas=linspace_float32(8))
    assert sigmas[4] == 0.75
    assert acts(sigmas[4], 0.25)
    assert not acts(sigmas[5], 0.25)


def test_both_ends_of_an_interval_are_guided():
    """Also where a level is no number of float32, as those of schedules are: float32(0.3) is above 0.3."""
    levels = np.float32([1, 0.9, 0.3, 0.1, 0])
    assert [acts(sigma, guidance_low=0.3, guidance_high=0.9) for sigma in levels] == [False, True, True, False, False]
    assert [acts(sigma, 0.5, 0.2, 0.8) for sigma in (0.9, 0.7, 0.5, 0.4)] == [False, True, True, False]
    assert all(map(acts, levels))


def test_zero_tokens_stay_zero():
    positive = np.float32([[[0, 0], [1, 1], [3, 4]]])
    negative = np.float32([[[0, 0], [2, 2], [3, 4]]])
    # The second token's combination is 2 + 2 (1 - 2) = 0; both norms of the first are 0.
    np.testing.assert_array_equal(norm_preserving_guidance(positive, negative, 2.0), [[[0, 0], [0, 0], [3, 4]]])
    zeros = np.zeros((2, 3, 4), np.float32)
    np.testing.assert_array_equal(norm_capped_guidance(zeros, zeros, 3.0, 1.0), zeros)
    ones = np.ones((2, 3, 4), np.float32)
    np.testing.assert_array_equal(norm_capped_guidance(zeros, ones, 3.0, 1.0), zeros)


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
def test_diffsynth_scales(scale):
    """DiffSynth computes neg + s (pos - neg) for both families."""
    rng = np.random.default_rng(0)
    positive, negative = rng.standard_normal((2, 1, 4, 8), np.float32)
    expected = negative + scale * (positive - negative)
    ours = norm_capped_guidance(positive, negative, ZImage.guidance_scale(scale))
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)
    assert ZImage.cfg_scale(ZImage.guidance_scale(scale)) == scale
    assert QwenImage.cfg_scale(QwenImage.guidance_scale(scale)) == scale
    direction = norm_preserving_guidance(positive, negative, QwenImage.guidance_scale(scale))
    cosine = (direction * expected).sum(-1) / np.linalg.norm(direction, axis=-1) / np.linalg.norm(expected, axis=-1)
    np.testing.assert_allclose(cosine, 1, rtol=1e-6)
