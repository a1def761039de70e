from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from zimgkit.engines.errors import CheckpointError, UsageError
from zimgkit.runtime.diffusion.schedule import (
    calculate_mu,
    euler_step,
    flow_match_sigmas,
    linspace_float32,
    read_scheduler,
    timesteps,
)
from zimgkit.runtime.families import qwen_image, z_image

QWEN: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen": QWEN,
    "lightning": QWEN | {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None},
    "layered": QWEN | {"time_shift_type": "linear", "shift_terminal": False},
    "linear_terminal": QWEN | {"time_shift_type": "linear", "shift_terminal": 0.05},
    "z_turbo": {"shift": 3.0, "use_dynamic_shifting": False, "num_train_timesteps": 1000},
    "z_base": {"shift": 6, "use_dynamic_shifting": False},
    "static_terminal": {"shift": 2.5, "shift_terminal": 0.1},
    "plain": {},
}
STEPS = [1, 2, 3, 4, 7, 8, 9, 15, 20, 28, 30, 40, 50, 99, 100]


def diffusers_sigmas(config, sigmas, mu):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return scheduler.sigmas.numpy(), scheduler.timesteps.numpy()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [16, 24, 1024, 4096, 6889])
def test_equal_to_diffusers(name, tokens):
    config = CONFIGS[name]
    mu = calculate_mu(tokens, read_scheduler(config))
    for steps in STEPS[1 if config.get("shift_terminal") else 0 :]:
        expected, expected_timesteps = diffusers_sigmas(config, np.linspace(1.0, 1 / steps, steps), mu)
        ours = flow_match_sigmas(steps, read_scheduler(config), mu=mu)
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, expected)
        np.testing.assert_array_equal(timesteps(ours[:-1]), expected_timesteps)


@pytest.mark.parametrize("name", ["z_turbo", "z_base"])
def test_z_image_sigmas(name):
    # A torch without fused multiply-add rounds once more.
    tolerance = 0 if torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"} else 1.2e-7
    for steps in range(1, 201):
        reference = get_default_z_image_sigmas(steps)
        np.testing.assert_allclose(linspace_float32(steps), reference, rtol=0, atol=tolerance)
        expected, _ = diffusers_sigmas(CONFIGS[name], reference, 0.7)
        np.testing.assert_array_equal(
            flow_match_sigmas(steps, read_scheduler(CONFIGS[name]), mu=0.7, sigmas=reference), expected
        )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sigmas", [[1.0, 0.5], [0.6, 0.45, 0.3, 0.15], [0.37], [1.0, 0.9, 0.2, 0.0]])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_custom_sigmas(name, sigmas):
    expected, _ = diffusers_sigmas(CONFIGS[name], sigmas, 0.83)
    np.testing.assert_array_equal(
        flow_match_sigmas(30, read_scheduler(CONFIGS[name]), mu=0.83, sigmas=sigmas), expected
    )


@pytest.mark.parametrize("mu", [math.log(2.5), math.log(3), 0.5, 2.5, 4])
@pytest.mark.parametrize("name", ["qwen", "lightning", "layered"])
def test_given_mu(name, mu):
    expected, _ = diffusers_sigmas(CONFIGS[name], np.linspace(1.0, 1 / 12, 12), mu)
    np.testing.assert_array_equal(flow_match_sigmas(12, read_scheduler(CONFIGS[name]), mu=mu), expected)


def test_one_step_leaves_out_the_stretch():
    np.testing.assert_array_equal(flow_match_sigmas(1, read_scheduler(QWEN), mu=0.7), np.float32([1, 0]))


def test_published_values():
    sigmas = flow_match_sigmas(50, read_scheduler(QWEN), mu=calculate_mu(4096, read_scheduler(QWEN)))
    np.testing.assert_allclose(
        sigmas[[0, 1, 2, 3, -4, -3, -2, -1]], [1, 0.98970, 0.97919, 0.96847, 0.09550, 0.05848, 0.02, 0], atol=6e-6
    )
    turbo = flow_match_sigmas(8, read_scheduler(CONFIGS["z_turbo"]), mu=None, sigmas=linspace_float32(8))
    np.testing.assert_allclose(turbo, [1, 0.95455, 0.9, 0.83333, 0.75, 0.64286, 0.5, 0.3, 0], atol=6e-6)


@pytest.mark.parametrize("tokens", [16, 256, 4096, 6889, 16384])
def test_mu(tokens):
    assert calculate_mu(tokens, read_scheduler(QWEN)) == calculate_shift(tokens, 256, 8192, 0.5, 0.9)
    assert calculate_mu(tokens, read_scheduler({})) == calculate_shift(tokens)


@pytest.mark.parametrize(
    "key", ["invert_sigmas", "stochastic_sampling", "use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas"]
)
def test_refuses_flags(key):
    flow_match_sigmas(4, read_scheduler(QWEN | {key: False}), mu=0.5)
    with pytest.raises(CheckpointError, match=key):
        flow_match_sigmas(4, read_scheduler(QWEN | {key: True}), mu=0.5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("time_shift_type", "cosine"),
        ("time_shift_type", None),
        ("_class_name", "DDIMScheduler"),
        ("num_train_timesteps", 100),
        ("shift_terminal", "0.02"),
        ("shift_terminal", True),
        ("shift_terminal", 1.0),
        ("shift_terminal", -0.1),
    ],
)
def test_refuses_other_configs(key, value):
    with pytest.raises(CheckpointError, match=key):
        flow_match_sigmas(4, read_scheduler(QWEN | {key: value}), mu=0.5)


@pytest.mark.parametrize("value", ["3", None, math.nan, math.inf, True])
def test_refuses_bad_numbers(value):
    with pytest.raises(CheckpointError, match="shift is"):
        flow_match_sigmas(4, read_scheduler({"shift": value}), mu=None)
    with pytest.raises(CheckpointError, match="max_shift"):
        calculate_mu(4096, read_scheduler({"max_shift": value}))


def test_refuses_a_line_through_one_point():
    with pytest.raises(CheckpointError, match="base_image_seq_len"):
        calculate_mu(100, read_scheduler({"base_image_seq_len": 4096}))


@pytest.mark.parametrize("steps", [0, -1])
def test_refuses_no_steps(steps):
    with pytest.raises(UsageError, match="num_inference_steps"):
        flow_match_sigmas(steps, read_scheduler(QWEN), mu=0.5)
    with pytest.raises(UsageError, match="num_inference_steps"):
        linspace_float32(steps)


@pytest.mark.parametrize("sigmas", [[], [1.1], [-0.1], [math.nan], [[0.5]], ["a"], [0.5, [0.1]], 0.5])
def test_refuses_bad_sigmas(sigmas):
    with pytest.raises(UsageError, match="sigmas"):
        flow_match_sigmas(4, read_scheduler(QWEN), mu=0.5, sigmas=sigmas)


@pytest.mark.parametrize("mu", [None, math.nan, math.inf, 1000.0, -1000.0])
def test_refuses_bad_mu(mu):
    with pytest.raises(UsageError, match="mu"):
        flow_match_sigmas(4, read_scheduler(QWEN), mu=mu)


@pytest.mark.parametrize("mu", [0.0, -1.0, math.nan])
def test_refuses_bad_mu_of_the_linear_shift(mu):
    with pytest.raises(UsageError, match="mu"):
        flow_match_sigmas(4, read_scheduler(CONFIGS["layered"]), mu=mu)


@pytest.mark.parametrize("name", ["qwen", "z_turbo"])
@pytest.mark.parametrize("seed", range(3))
def test_euler_steps(name, seed):
    rng = np.random.default_rng(seed)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(CONFIGS[name])
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.2, 5), mu=0.7)
    sigmas = flow_match_sigmas(5, read_scheduler(CONFIGS[name]), mu=0.7)
    latents = rng.standard_normal((2, 24, 16), np.float32)
    expected = torch.from_numpy(latents)
    for i, t in enumerate(scheduler.timesteps):
        velocity = rng.standard_normal(latents.shape, np.float32)
        latents = euler_step(latents, velocity, sigmas[i], sigmas[i + 1])
        expected = scheduler.step(torch.from_numpy(velocity), t, expected, return_dict=False)[0]
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(latents, expected.numpy())


def test_network_times():
    sigmas = flow_match_sigmas(50, read_scheduler(QWEN), mu=0.7)[:-1]
    t = torch.from_numpy(sigmas) * 1000
    np.testing.assert_array_equal(qwen_image.network_time(sigmas), (t / 1000).numpy())
    np.testing.assert_array_equal(z_image.network_time(sigmas), ((1000 - t) / 1000).numpy())
