from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, ZImagePipeline

from tests.training import toy
from zimgkit.export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from zimgkit.runtime.diffusion.schedule import read_scheduler
from zimgkit.training import families, prompts
from zimgkit.training.checkpoint import load_component, load_tokenizer
from zimgkit.training.dataset import read_dataset
from zimgkit.training.diffusion import Denoiser, denoiser_task, draw_sigmas
from zimgkit.training.latents import cache_latents
from zimgkit.training.stages import train_model_tokenizer

FAMILIES = list(toy.CONFIGS)
PIPELINES = {"z-image": ZImagePipeline, "qwen-image": QwenImagePipeline}
PROMPTS = ["a red circle, large", "蓝色", "a very large green square left of a red circle"]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("diffusion")
    toy.dataset(folder / "data", [(32, 32), (32, 64)])
    train_model_tokenizer(folder / "data", folder / "begun", request.param, configs=toy.CONFIGS[request.param])
    return open_checkpoint(str(folder / "begun"))


def random_transformer(checkpoint: Checkpoint) -> Any:
    """Untrained, a transformer predicts zeros: these weights show every input."""
    transformer = load_component(checkpoint, "transformer").eval()
    torch.manual_seed(3)
    for parameter in transformer.parameters():
        parameter.data = torch.randn(parameter.shape) * (0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
    return transformer


def test_prompts_are_encoded_as_the_pipeline_does(checkpoint: Checkpoint) -> None:
    tokenizer, text_encoder = load_tokenizer(checkpoint), load_component(checkpoint, "text_encoder").eval()
    family = families.family(checkpoint.family)
    pipeline = PIPELINES[family.name](FlowMatchEulerDiscreteScheduler(), None, text_encoder, tokenizer, None)
    ids, mask = prompts.pad(prompts.tokenize([*PROMPTS, " ", ""], tokenizer, family))
    with torch.no_grad():
        rows, mask = family.encode(text_encoder, ids, mask)
        together = [row[keep] for row, keep in zip(rows, mask, strict=True)]
        for index, prompt in enumerate([*PROMPTS, " ", ""]):
            found = pipeline.encode_prompt(
                [prompt],
                device="cpu",
                **({"do_classifier_free_guidance": False} if family.name == "z-image" else {}),
            )[0][0]
            torch.testing.assert_close(together[index], found, atol=1e-5, rtol=1e-5)
    alone = prompts.encode_all(text_encoder, prompts.tokenize(PROMPTS, tokenizer, family), family)
    for first, second in zip(alone, together, strict=False):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_a_batch_is_what_its_pictures_are_alone(checkpoint: Checkpoint) -> None:
    transformer, velocity = random_transformer(checkpoint), families.family(checkpoint.family).velocity
    generator = torch.Generator().manual_seed(0)
    latents, sigmas = torch.randn(3, 4, 4, 8, generator=generator), torch.tensor([0.1, 0.5, 0.9])
    texts = [torch.randn(length, 32, generator=generator) for length in (40, 7, 19)]
    rows, mask = prompts.pad(texts)
    with torch.no_grad():
        together = velocity(transformer, latents, sigmas, rows, mask)
        for index, text in enumerate(texts):
            one = velocity(
                transformer,
                latents[index : index + 1],
                sigmas[index : index + 1],
                text[None],
                torch.ones(1, len(text), dtype=torch.bool),
            )
            torch.testing.assert_close(together[index : index + 1], one, atol=1e-5, rtol=1e-4)


def test_the_velocity_leads_where_the_pipeline_goes(checkpoint: Checkpoint) -> None:
    """Euler steps of ours end at the latents that the reference pipeline ends at."""
    family, own = checkpoint.family, families.family(checkpoint.family)
    transformer, text_encoder = random_transformer(checkpoint), load_component(checkpoint, "text_encoder").eval()
    tokenizer = load_tokenizer(checkpoint)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(checkpoint.config("scheduler"))
    pipeline = PIPELINES[family](scheduler, load_component(checkpoint, "vae"), text_encoder, tokenizer, transformer)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"guidance_scale": 0.0} if family == "z-image" else {"true_cfg_scale": 1.0}
    start = noise if family == "z-image" else pipeline._pack_latents(noise, 1, 4, 4, 8)
    end = pipeline(
        [PROMPTS[0]], height=32, width=64, num_inference_steps=4, latents=start, output_type="latent", **options
    ).images
    end = end if family == "z-image" else pipeline._unpack_latents(end, 32, 64, 8).squeeze(2)
    ids, mask = prompts.pad(prompts.tokenize(PROMPTS[:1], tokenizer, own))
    with torch.no_grad():
        rows, mask = own.encode(text_encoder, ids, mask)
        latents = noise
        for sigma, after in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
            latents = latents + (after - sigma) * own.velocity(transformer, latents, sigma[None], rows, mask)
    torch.testing.assert_close(latents, end, atol=1e-4, rtol=1e-4)


def test_the_loss_is_that_of_the_velocity(checkpoint: Checkpoint) -> None:
    """A network that predicts zero, as it does at first, is wrong by the velocity itself."""
    module = Denoiser(families.family(checkpoint.family), load_component(checkpoint, "transformer"))
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 4, 4, generator=generator) for _ in range(2))
    text, mask = torch.randn(2, 5, 32, generator=generator), torch.ones(2, 5, dtype=torch.bool)
    loss = module(latents, noise, torch.tensor([0.3, 0.6]), text, mask)
    torch.testing.assert_close(loss, (noise - latents).square().mean())


def test_everything_that_is_trained_gets_gradients(checkpoint: Checkpoint, tmp_path: Path) -> None:
    dataset = read_dataset(checkpoint.root.parent / "data")
    task = denoiser_task(checkpoint, dataset, cache_latents(checkpoint, dataset, tmp_path))
    for parameter in task.module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    task.module(**task.batch(torch.Generator().manual_seed(0), 8)).backward()
    for name, parameter in task.module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()), name
        else:
            assert parameter.grad is None, name
            unused = ("visual", "layers.1", "norm.weight", "txt_mlp", "to_add_out", "add_q_proj", "norm_added_q")
            assert any(part in name for part in unused), name


def test_captions_are_left_out_now_and_then(checkpoint: Checkpoint, tmp_path: Path) -> None:
    dataset = read_dataset(checkpoint.root.parent / "data")
    task = denoiser_task(checkpoint, dataset, cache_latents(checkpoint, dataset, tmp_path))
    batch = task.batch(torch.Generator().manual_seed(0), 400)
    none = {tuple(ids.tolist()) for ids in task.no_prompts}
    rows = [tuple(ids[keep].tolist()) for ids, keep in zip(batch["text"], batch["mask"], strict=True)]
    dropped = sum(row in none for row in rows)
    assert 20 < dropped < 65
    assert set(rows) & none == none
    assert 0 < float(batch["sigmas"].min()) < float(batch["sigmas"].max()) < 1
    assert batch["latents"].shape == batch["noise"].shape


def test_noise_levels_are_spread_as_the_schedules_are() -> None:
    generator = torch.Generator().manual_seed(0)
    for family, tokens in (("z-image", 64), ("qwen-image", 64), ("qwen-image", 4096)):
        config = {key: value for key, value in toy.CONFIGS[family]["scheduler"].items() if key != "shift_terminal"}
        scheduler = FlowMatchEulerDiscreteScheduler(**config)
        # The straight line of mu is that of the model reference: 0.5 at 256 tokens, 0.9 at 8192.
        mu = 0.5 + 0.4 * (tokens - 256) / (8192 - 256)
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.001, 1000), **({"mu": mu} if family == "qwen-image" else {}))
        drawn = draw_sigmas(20000, tokens, read_scheduler(config), generator)
        levels = torch.linspace(0.05, 0.95, 10)
        torch.testing.assert_close(drawn.quantile(levels), scheduler.sigmas[:-1].quantile(levels), atol=0.02, rtol=0)
