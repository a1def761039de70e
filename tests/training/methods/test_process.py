"""What the first stage makes, against the reference's networks and against the pipeline's own pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from zimgkit.engines.errors import UsageError
from zimgkit.export.checkpoints.checkpoint import open_checkpoint
from zimgkit.runtime import Pipeline
from zimgkit.training import families, prompts
from zimgkit.training.checkpoint import load_component, load_tokenizer
from zimgkit.training.dataset import read_dataset
from zimgkit.training.latents import Images, cache_latents
from zimgkit.training.methods.cache import Cache, Texts
from zimgkit.training.methods.losses import DirectDistillation, TrajectoryImitation
from zimgkit.training.methods.process import DISTILL, IMITATE, SFT, FewSteps, process
from zimgkit.training.methods.tasks import task_of
from zimgkit.training.methods.teacher import passing_through, scheduler_with, student_scheduler

CacheOf = Callable[[str, str], Cache]


def test_encoded_as_the_networks_of_the_one_stage_run_do(
    model: str, pictures: Path, cache_of: CacheOf, tmp_path: Path
) -> None:
    cache, checkpoint, dataset = cache_of(model, SFT), open_checkpoint(model), read_dataset(pictures)
    reference = Images(dataset, cache_latents(checkpoint, dataset, tmp_path))
    assert cache.sizes == reference.sizes
    for rows in cache.buckets.values():
        # Rounding to bfloat16 may go the other way.
        torch.testing.assert_close(cache.of_rows(rows), reference.of_rows(rows), rtol=2**-7, atol=1e-3)
    family = families.family(checkpoint.family)
    wanted = [*(row.prompt for row in dataset.rows), *family.no_prompts]
    ids = prompts.tokenize(wanted, load_tokenizer(checkpoint), family)
    rows = prompts.encode_all(load_component(checkpoint, "text_encoder").eval(), ids, family)
    for found, expected in zip([*Texts(cache), *Texts(cache, no_prompts=True)], rows, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_teacher_is_the_pipeline(model: str, pictures: Path, cache_of: CacheOf) -> None:
    cache, row = cache_of(model, DISTILL), read_dataset(pictures).rows[1]
    height, width = row.size
    with Pipeline.open(model) as pipeline:
        defaults = pipeline.bundle.manifest.defaults
        call = {"height": height, "width": width, "seed": 1, "negative_prompt": defaults.negative_prompt}
        latents = pipeline(row.prompt, num_inference_steps=8, output_type="latent", **call).images
        image = pipeline.session.decode(latents, height, width)
        noise, last = cache.get("trajectory", 1).numpy()
        # Through the decoder, which takes them as the pipeline keeps them.
        kept = last[None] if latents.ndim == 4 else pipeline.session.family.from_noise(last[None, None])
        np.testing.assert_allclose(pipeline.session.decode(kept, height, width), image, atol=1e-4)
        drawn = pipeline.draw_noise(1, 1, height, width)
        begun = noise[None] if drawn.ndim == 4 else pipeline.session.family.from_noise(noise[None, None])
        np.testing.assert_allclose(begun, drawn, atol=1e-5)


def test_a_student_draws_what_the_pipeline_draws_with_its_schedule(model: str, cache_of: CacheOf) -> None:
    """The loss is the distance to the teacher of what the engines draw in the student's steps without guidance."""
    cache, checkpoint = cache_of(model, DISTILL), open_checkpoint(model)
    transformer = load_component(checkpoint, "transformer").eval()
    task = task_of(DISTILL, cache, families.family(checkpoint.family), transformer, checkpoint.config("scheduler"))
    size, rows = next(iter(cache.buckets.items()))
    row, levels = int(rows[0]), torch.tensor(cache.index.sigmas["x".join(map(str, size))])
    trajectory, text = cache.get("trajectory", row)[None], cache.get("text", row)[None]
    with torch.no_grad():
        loss = task.module(trajectory, levels[None], text, torch.ones(text.shape[:2], dtype=torch.bool))
    with Pipeline.open(model) as pipeline:
        pipeline.session.scheduler = scheduler_with(pipeline.bundle.manifest.scheduler, cache.index.scheduler)
        latents = pipeline(
            cache.index.rows[row][0],
            height=size[0],
            width=size[1],
            seed=row,
            num_inference_steps=2,
            cfg_scale=1,
            output_type="latent",
        ).images
        last = trajectory[:, -1].numpy()
        if latents.ndim != 4:
            last = pipeline.session.family.from_noise(last[None])
    assert float(loss) == pytest.approx(float(np.square(latents - last).mean()), rel=2e-2)  # Tables in bfloat16.


def test_a_teacher_goes_through_the_points_of_its_student(model: str, cache_of: CacheOf) -> None:
    cache, checkpoint = cache_of(model, IMITATE), open_checkpoint(model)
    assert cache.get("trajectory", 0).shape[0] == 3
    task = task_of(
        IMITATE,
        cache,
        families.family(checkpoint.family),
        load_component(checkpoint, "transformer"),
        checkpoint.config("scheduler"),
    )
    batch = task.batch(torch.Generator().manual_seed(3), 4)
    assert isinstance(task.module, TrajectoryImitation)
    assert batch["trajectory"].shape[:2] == (4, 3) and batch["sigmas"].shape == (4, 3)
    assert batch["sigmas"][0].tolist() == pytest.approx([1, 2 / 3, 0])  # A shift of 2.
    assert set(batch["step"].tolist()) <= {0, 1}


def test_losses_by_hand() -> None:
    """On a network whose velocity is the latents times sigma."""

    class Known:
        def velocity(self, network: object, latents: torch.Tensor, sigmas: torch.Tensor, *text: object) -> torch.Tensor:
            return latents * sigmas[:, None, None, None]

    network, points = torch.nn.Linear(1, 1), torch.tensor([2.0, 3.0, 5.0]).reshape(1, 3, 1, 1, 1)
    sigmas, text = torch.tensor([[1.0, 0.5, 0.0]]), torch.zeros(1, 1, 1)
    mask = torch.ones(1, 1, dtype=torch.bool)
    distilled = DirectDistillation(Known(), network)(points, sigmas, text, mask)  # type: ignore[arg-type]
    first = 2 - 0.5 * 2 * 1
    assert float(distilled) == pytest.approx((first - 0.5 * first * 0.5 - 5) ** 2)
    module = TrajectoryImitation(Known(), network)  # type: ignore[arg-type]
    second = module(points, sigmas, torch.tensor([1]), text, mask)
    assert float(second) == pytest.approx((3 * 0.5 - (5 - 3) / -0.5) ** 2)


def test_schedules_that_pass_through_points() -> None:
    sigmas, wanted = np.linspace(1, 0, 9, dtype=np.float32), np.array([1, 0.7, 0.3, 0], np.float32)
    moved, places = passing_through(sigmas, wanted)
    assert places == [0, 2, 6, 8]
    assert moved[places].tolist() == wanted.tolist()
    with pytest.raises(UsageError, match="a teacher of 2 steps has too few for a student of 3; give more"):
        passing_through(np.array([1, 0.5, 0], np.float32), wanted)


def test_the_schedule_of_a_student() -> None:
    assert student_scheduler({"shift": 3.0}, None) == {}
    assert student_scheduler({"shift": 3.0, "use_dynamic_shifting": False}, 2.0) == {"shift": 2.0}
    dynamic = student_scheduler({"use_dynamic_shifting": True, "shift_terminal": 0.02}, 3.0)
    assert dynamic["base_shift"] == dynamic["max_shift"] == pytest.approx(np.log(3))
    assert dynamic["shift_terminal"] is None
    with pytest.raises(UsageError, match="--shift is 0"):
        student_scheduler({}, 0.0)


def test_a_bundle_that_encodes_no_pictures(bundle_of: Callable[..., Path], pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="encodes no pictures; build it with --tasks"):
        process(str(bundle_of("z-image")), read_dataset(pictures), tmp_path / "cache", SFT)
    with pytest.raises(UsageError, match="--num_inference_steps is 0"):
        process("zimg-tiny-z", read_dataset(pictures), tmp_path / "cache", DISTILL, student=FewSteps(0))
