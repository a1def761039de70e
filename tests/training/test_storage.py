from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

from tests.training import toy
from zimgkit.training import families
from zimgkit.training.lora import add_adapters
from zimgkit.training.storage import Float8Linear, checkpoint_activations, store_in_float8

FAMILY = families.family("qwen-image")


def adapted() -> Any:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**toy.CONFIGS["qwen-image"]["transformer"])
    add_adapters(model, FAMILY, "to_q,to_v,img_mlp.net.2", rank=2, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.1)
    return model


def gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 4, 6, generator=generator)
    text = torch.randn(2, 5, 32, generator=generator)
    mask = torch.ones(2, 5, dtype=torch.bool)
    out = FAMILY.velocity(model, latents, torch.tensor([0.3, 0.7]), text, mask)
    loss = out.square().mean()
    loss.backward()
    return float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_linear_in_8_bits_is_that_of_its_rounded_weights() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 10)
    stored = Float8Linear(linear)
    rounded = nn.Linear(24, 10)
    rounded.weight.data, rounded.bias = stored.weight.clone(), linear.bias
    error = (stored.weight - linear.weight).norm() / linear.weight.norm()
    assert 0 < error < 2**-4
    first, second = (torch.randn(3, 24, generator=torch.Generator().manual_seed(2), requires_grad=True) for _ in "ab")
    stored(first).square().sum().backward()
    rounded(second).square().sum().backward()
    torch.testing.assert_close(first.grad, second.grad)


def test_frozen_weights_take_a_quarter_and_losses_stay() -> None:
    plain, stored = adapted(), adapted()
    store_in_float8(stored)

    def size(model: Any) -> int:
        return sum(
            value.nbytes for name, value in model.state_dict().items() if "lora_" not in name and ".attn." in name
        )

    assert size(stored) < 0.45 * size(plain)  # Factors and biases are as they were.
    (before, whole), (after, grads) = gradients(plain), gradients(stored)
    assert after == pytest.approx(before, rel=0.05)
    assert grads.keys() == whole.keys() and all("lora_" in name for name in grads)
    for name, value in grads.items():
        assert (value - whole[name]).norm() <= 0.2 * whole[name].norm() + 1e-6, name


@pytest.mark.parametrize("offload", [False, True])
def test_activations_that_are_computed_twice(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = adapted().train(), adapted().train()
    checkpoint_activations(model, offload=offload)
    moved = []
    real = torch.autograd.graph.save_on_cpu
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", lambda: moved.append(1) or real())
    (loss, whole), (same, grads) = gradients(plain), gradients(model)
    assert same == loss
    assert all(torch.equal(value, whole[name]) for name, value in grads.items())
    assert len(moved) == (len(model.transformer_blocks) if offload else 0)
