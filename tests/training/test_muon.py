from __future__ import annotations

import pytest
import torch
from torch import nn

from zimgkit.training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4), (96, 384), (1, 5)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    given = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    made = orthogonalize(given)
    left, values, right = torch.linalg.svd(given, full_matrices=False)
    turned = left.mT @ made @ right.mT
    found = turned.diagonal(dim1=1, dim2=2)
    big = values > 0.1 * values[:, :1]
    assert (found[big] > 0.6).all()
    assert (found < 1.3).all()
    torch.testing.assert_close(turned, torch.diag_embed(found), atol=1e-4, rtol=0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_torch(decay: float) -> None:
    """Up to bfloat16, in which torch's own multiplies, over shapes that go together and shapes that do not."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(16, 16), (16, 16), (24, 16), (16, 40)]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    own = Muon(ours, lr=0.05, weight_decay=decay)
    reference = torch.optim.Muon(
        theirs, lr=0.05, weight_decay=decay, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        own.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=0.02, rtol=0.02)


def test_it_learns_a_product() -> None:
    torch.manual_seed(2)
    layers = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))
    optimizer = Muon(layers.parameters(), lr=0.05)
    x = torch.randn(64, 8)
    first = None
    for _ in range(200):
        loss = (layers(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < 0.02 * first
