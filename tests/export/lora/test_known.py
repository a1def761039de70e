"""LoRAs that bring their own settings, against the schedules their authors give."""

from __future__ import annotations

import math

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from zimgkit.engines.bundle import Defaults, MergedLora
from zimgkit.engines.errors import UsageError
from zimgkit.export.lora.known import Recommendation, recommendation_for
from zimgkit.runtime.diffusion.schedule import calculate_mu, flow_match_sigmas, read_scheduler

QWEN = Recommendation(
    Defaults(50, 4.0, 1328, 1328, " "),
    {
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 8192,
        "max_shift": 0.9,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "shift_terminal": 0.02,
        "time_shift_type": "exponential",
        "use_dynamic_shifting": True,
    },
)
Z = Recommendation(
    Defaults(50, 4.0, 1024, 1024), {"shift": 3.0, "use_dynamic_shifting": False, "num_train_timesteps": 1000}
)


def lora(source, scale=1.0):
    return MergedLora(source, "0" * 64, scale)


LIGHTNING = "lightx2v/Qwen-Image-Lightning/Qwen-Image-Lightning-{}steps-V1.1-bf16.safetensors"


@pytest.mark.parametrize(
    ("source", "steps"),
    [
        (LIGHTNING.format(4), 4),
        (LIGHTNING.format(8), 8),
        ("lightx2v/x:Qwen-Image-2512-Lightning-4steps-V1.0-fp32.safetensors", 4),
        ("/home/me/loras/qwen-image-lightning-8steps.safetensors", 8),
    ],
)
@pytest.mark.parametrize("tokens", [256, 4096, 6889])
def test_lightning(source, steps, tokens):
    found = recommendation_for([lora(source)], "qwen-image", QWEN)
    assert (found.defaults.num_inference_steps, found.defaults.guidance_scale) == (steps, 1.0)
    assert (found.defaults.height, found.defaults.negative_prompt) == (1328, " ")
    scheduler = read_scheduler(found.scheduler)
    # The authors' own scheduler, in diffusers.
    theirs = FlowMatchEulerDiscreteScheduler(
        base_shift=math.log(3), max_shift=math.log(3), shift=1.0, shift_terminal=None, use_dynamic_shifting=True,
        base_image_seq_len=256, max_image_seq_len=8192, time_shift_type="exponential",
    )  # fmt: skip
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=math.log(3))
    ours = flow_match_sigmas(steps, scheduler, mu=calculate_mu(tokens, scheduler))
    np.testing.assert_allclose(ours, theirs.sigmas.numpy(), atol=1e-6)


def test_distill_lora_keeps_the_schedule():
    for source in (
        "DiffSynth-Studio/Qwen-Image-Distill-LoRA/model.safetensors",
        "/x/Qwen-Image-Distill-LoRA/model.safetensors",
    ):
        found = recommendation_for([lora(source)], "qwen-image", QWEN)
        assert (found.defaults.num_inference_steps, found.defaults.guidance_scale) == (15, 1.0)
        assert found.scheduler == QWEN.scheduler


def test_three_steps():
    found = recommendation_for(
        [lora("MusePublic/Qwen-Image-Distill/qwen_image_distill_3step.safetensors")], "qwen-image", QWEN
    )
    assert (found.defaults.num_inference_steps, found.defaults.guidance_scale) == (3, 1.0)
    assert calculate_mu(1234, read_scheduler(found.scheduler)) == pytest.approx(math.log(2.5))
    assert found.scheduler["shift_terminal"] == 0.02


def test_distill_patch_beside_a_style():
    patch = "DiffSynth-Studio/Z-Image-Turbo-DistillPatch/model.safetensors"
    found = recommendation_for([lora("/x/style.safetensors", 0.7), lora(patch)], "z-image", Z)
    assert (found.defaults.num_inference_steps, found.defaults.guidance_scale) == (8, 0.0)
    assert found.scheduler == Z.scheduler


@pytest.mark.parametrize(
    ("source", "scale", "family"),
    [
        ("/x/style.safetensors", 1.0, "qwen-image"),
        (LIGHTNING.format(8), -1.0, "qwen-image"),
        (LIGHTNING.format(8), 1.0, "z-image"),
        ("/x/Qwen-Image-Edit-Lightning-8steps-V1.0.safetensors", 1.0, "qwen-image"),
        ("/Qwen-Image-Distill-LoRA/many/other/folders/here/style.safetensors", 1.0, "qwen-image"),
    ],
)
def test_others_change_nothing(source, scale, family):
    base = QWEN if family == "qwen-image" else Z
    assert recommendation_for([lora(source, scale)], family, base) == base


def test_the_user_has_the_last_word():
    found = recommendation_for(
        [lora(LIGHTNING.format(8))], "qwen-image", QWEN, num_inference_steps=6, guidance_scale=0.0
    )
    assert (found.defaults.num_inference_steps, found.defaults.guidance_scale) == (6, 0.0)
    assert recommendation_for([], "qwen-image", QWEN, guidance_scale=2.0).defaults.num_inference_steps == 50


def test_two_that_differ():
    with pytest.raises(UsageError, match="different numbers of steps"):
        recommendation_for([lora(LIGHTNING.format(4)), lora(LIGHTNING.format(8))], "qwen-image", QWEN)


@pytest.mark.parametrize("bad", [{"num_inference_steps": 0}, {"guidance_scale": math.nan}])
def test_numbers_out_of_range(bad):
    with pytest.raises(UsageError):
        recommendation_for([], "z-image", Z, **bad)
