"""What is attached to diffusers' transformers, against the networks that zimgkit exports."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import QwenImageTransformer2DModel, ZImageTransformer2DModel
from torch import Tensor, nn

from tests.training import toy
from zimgkit.export.networks import qwen_image, qwen_image_variants, z_image, z_image_control
from zimgkit.runtime.families.qwen_image import QwenImage
from zimgkit.runtime.families.z_image import ZImage
from zimgkit.training import families


def randomized(network: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network.eval()


def load(network: nn.Module, state: dict[str, Tensor]) -> Any:
    own = network.state_dict()
    network.load_state_dict({name: state[name] for name in own})
    return network.eval()


def qwen_rows(transformer: Any, latents: Tensor, sigma: Tensor) -> Tensor:
    """The row of the modulation table."""
    time = nn.functional.silu(transformer.time_text_embed(sigma, latents))
    rows = [linear[1](time) for block in transformer.transformer_blocks for linear in (block.img_mod, block.txt_mod)]
    return torch.cat([*rows, transformer.norm_out.linear(time)], dim=1).reshape(-1, transformer.inner_dim)


def packed(latents: Tensor) -> Tensor:
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height * width // 4, channels * 4)


CONFIG = toy.CONFIGS["qwen-image"]["transformer"]
Z_CONFIG = toy.CONFIGS["z-image"]["transformer"]
REST = {
    "text_encoder": {"rope_theta": 1e6, "hidden_size": 32, "num_attention_heads": 2},
    "vae": {"scaling_factor": 1.0, "shift_factor": 0.0},
}
SIGMA = torch.tensor([0.7])


@torch.no_grad()
def test_regions_are_those_of_the_exported_denoiser() -> None:
    family, transformer = families.family("qwen-image"), randomized(QwenImageTransformer2DModel(**CONFIG))
    family.attach_regions(transformer)
    latents, lengths = torch.randn(1, 4, 4, 6), (3, 5, 4)
    texts = [torch.randn(length, 32) for length in lengths]
    regions = torch.rand(2, 6) > 0.5
    text = nn.utils.rnn.pad_sequence(texts, batch_first=True).flatten(0, 1)[None]
    mask = torch.cat([torch.arange(5) < length for length in lengths])[None]
    found = family.velocity(transformer, latents, SIGMA, text, mask, regions=regions[None])

    host, parsed = QwenImage({"transformer": CONFIG, **REST}), qwen_image.read_config(CONFIG)
    conditioner = load(qwen_image.QwenImageConditioner(parsed), transformer.state_dict())
    segments = [conditioner(one[None]).numpy() for one in texts]
    constants = host.masked_constants(None, segments, regions.numpy(), 32, 48, None)
    feeds = {name: torch.from_numpy(np.asarray(value)) for name, value in constants.items()}
    denoiser = load(qwen_image_variants.MaskedDenoiser(parsed), transformer.state_dict())
    expected = denoiser(packed(latents), modulation=qwen_rows(transformer, latents, SIGMA), **feeds)
    torch.testing.assert_close(packed(found), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_without_regions_the_processor_is_that_of_diffusers() -> None:
    family, transformer = families.family("qwen-image"), randomized(QwenImageTransformer2DModel(**CONFIG))
    arguments = torch.randn(2, 4, 4, 6), torch.rand(2), torch.randn(2, 5, 32)
    for mask in (torch.ones(2, 5, dtype=torch.bool), torch.arange(5)[None] < torch.tensor([[5], [3]])):
        expected = family.velocity(transformer, *arguments, mask)
        attached = randomized(QwenImageTransformer2DModel(**CONFIG))
        family.attach_regions(attached)
        torch.testing.assert_close(family.velocity(attached, *arguments, mask), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_pictures_beside_are_those_of_the_exported_denoiser() -> None:
    family, transformer = families.family("qwen-image"), randomized(QwenImageTransformer2DModel(**CONFIG))
    latents, other, text = torch.randn(1, 4, 4, 6), torch.randn(1, 4, 6, 4), torch.randn(5, 32)
    mask = torch.ones(1, 5, dtype=torch.bool)
    found = family.velocity(transformer, latents, SIGMA, text[None], mask, conditions=[other])
    host, parsed = QwenImage({"transformer": CONFIG, **REST}), qwen_image.read_config(CONFIG)
    conditioner = load(qwen_image.QwenImageConditioner(parsed), transformer.state_dict())
    own = torch.tensor([[*place] for place in _positions(5, (2, 3), (3, 2))])
    cos, sin = (torch.from_numpy(table) for table in _tables(host, own.numpy()))
    denoiser = load(qwen_image_variants.ConditionedDenoiser(parsed), transformer.state_dict())
    rows = qwen_rows(transformer, latents, SIGMA)
    expected = denoiser(packed(latents), packed(other), conditioner(text[None]), rows, cos, sin)
    torch.testing.assert_close(packed(found), expected, atol=1e-5, rtol=1e-4)


def _positions(tokens: int, *grids: tuple[int, int]) -> list[tuple[int, ...]]:
    start = max(max(rows // 2, columns // 2) for rows, columns in grids)
    text = [(start + index,) * 3 for index in range(tokens)]
    return text + [
        (frame, row - (rows - rows // 2), column - (columns - columns // 2))
        for frame, (rows, columns) in enumerate(grids)
        for row in range(rows)
        for column in range(columns)
    ]


def _tables(host: QwenImage, positions: Any) -> Any:
    from zimgkit.runtime.families.qwen_image import tables

    return tables(positions, host.transformer)


@torch.no_grad()
def test_a_blockwise_net_adds_what_the_exported_one_adds() -> None:
    family, transformer = families.family("qwen-image"), randomized(QwenImageTransformer2DModel(**CONFIG))
    arguments = torch.randn(2, 4, 4, 6), torch.rand(2), torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool)
    plain = family.velocity(transformer, *arguments)
    control = torch.randn(2, 4, 4, 6)
    net = family.nets["blockwise"](transformer, 4)
    net.attach(transformer)
    torch.testing.assert_close(family.velocity(transformer, *arguments, net=net, control=control), plain)
    randomized(net, 1)
    found = family.velocity(transformer, *arguments, net=net, control=control)
    assert float((found - plain).abs().max()) > 0.01
    # After each block, by hand.
    other, seen = randomized(QwenImageTransformer2DModel(**CONFIG)), net.img_in(packed(control))
    for own, block in zip(net.controlnet_blocks, other.transformer_blocks, strict=True):
        before = block.forward

        def forward(*args: Any, own: Any = own, before: Any = before, **kwargs: Any) -> Any:
            text, image = before(*args, **kwargs)
            return text, image + own.output_proj(nn.functional.gelu(own.input_proj(own.x_rms(image) + own.y_rms(seen))))

        block.forward = forward
    torch.testing.assert_close(family.velocity(other, *arguments), found, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_fun_net_gives_the_hints_of_the_exported_one() -> None:
    family, transformer = families.family("z-image"), randomized(ZImageTransformer2DModel(**Z_CONFIG))
    latents, control, text = torch.randn(1, 4, 6, 10), torch.randn(1, 4, 6, 10), torch.randn(5, 32)
    mask = torch.ones(1, 5, dtype=torch.bool)
    plain = family.velocity(transformer, latents, SIGMA, text[None], mask)
    net = family.nets["fun"](transformer, 4)
    net.attach(transformer)
    torch.testing.assert_close(
        family.velocity(transformer, latents, SIGMA, text[None], mask, net=net, control=control), plain
    )
    randomized(net, 1)
    found = family.velocity(transformer, latents, SIGMA, text[None], mask, net=net, control=control)
    assert float((found - plain).abs().max()) > 0.01
    state = {name.removeprefix("net."): value for name, value in net.state_dict().items()}
    parsed = z_image.read_config(Z_CONFIG)
    kind = z_image_control.read_control({name: tuple(value.shape) for name, value in state.items()}, parsed)
    whole = {f"control.x.{name}": value for name, value in state.items()} | transformer.state_dict()
    denoiser = load(z_image_control.ControlledDenoiser(parsed, kind, "x"), whole)
    conditioner = load(z_image.ZImageConditioner(parsed), transformer.state_dict())
    host = ZImage({"transformer": Z_CONFIG, **REST})
    feeds = {name: torch.from_numpy(value) for name, value in host.conditioner_inputs(text.numpy()).items()}
    constants = host.denoiser_constants(conditioner(**feeds).numpy(), 5, 48, 80)
    feeds = {name: torch.from_numpy(np.asarray(value)) for name, value in constants.items()}
    sinusoids = torch.from_numpy(host.schedule_inputs(None, SIGMA.numpy())(0)["sinusoids"])
    states = torch.from_numpy(host.denoiser_inputs(latents.numpy())["hidden_states"])
    condition = torch.from_numpy(host.denoiser_inputs(control.numpy())["hidden_states"])
    expected = denoiser(states, sinusoids, condition=condition, scale=torch.ones(1), **feeds)
    expected = host.velocity(expected.numpy(), latents.numpy())
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-5, rtol=1e-4)
