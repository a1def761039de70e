"""Attention that keeps no scores, against torch's."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zimgkit.export.graphs.assemble import assemble
from zimgkit.export.graphs.flash_attention import FlashAttention
from zimgkit.export.graphs.plan import record
from zimgkit.export.networks.layers import attention, rotate, split_heads
from zimgkit.export.networks.parts import Input
from zimgkit.export.networks.qwen_image_variants import Mask

WIDTH, HEADS = 48, 3
TOKENS = ("batch", "tokens", WIDTH)
HALF = ("batch", "tokens", WIDTH // HEADS // 2)
SIZES = ({"batch": 2, "tokens": 6}, {"batch": 3, "tokens": 10})


class Turned(nn.Module):
    """As the transformers' blocks have it: heads before tokens, and back."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = [split_heads(x, WIDTH // HEADS).transpose(1, 2) for x in (query, key, value)]
        return attention(*heads)


class Rotated(nn.Module):
    """With RoPE on queries and keys."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = (split_heads(x, WIDTH // HEADS).transpose(1, 2) for x in (query, key, value))
        return attention(rotate(query, cos, sin), rotate(key, cos, sin), value)


class OneHead(nn.Module):
    """As VAEs have it: nothing is turned, one head over all."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=0.3)[:, 0]


class Causal(nn.Module):
    """As text encoders have it."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = [split_heads(x, WIDTH // HEADS).transpose(1, 2) for x in (query, key, value)]
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)


class Grouped(nn.Module):
    """Likewise, with keys and values that heads have in common."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = split_heads(query, WIDTH // 6).transpose(1, 2)
        few = [split_heads(x[..., : WIDTH // 3], WIDTH // 6).transpose(1, 2) for x in (key, value)]
        out = F.scaled_dot_product_attention(heads, *few, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


class Masked(nn.Module):
    """Of some tokens, one mask for all."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        heads = [split_heads(x, 4).transpose(1, 2) for x in (query, key, value)]
        return attention(*heads, mask)


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.block(*inputs)
        return out


class NetWithTables(Net):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = self.block(query, key, value, cos, sin)
        return out


class NetOfThree(Net):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = self.block(query, key, value)
        return out


class NetWithMask(Net):
    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.mask = Mask()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = self.block(query, key, value, self.mask(mask))
        return out


def test_a_mask(tmp_path):
    """Of twelve heads six at a time."""
    inputs = [Input(name, torch.float32, TOKENS) for name in ("query", "key", "value")]
    inputs.append(Input("mask", torch.bool, ("tokens", "tokens")))
    with torch.device("meta"):
        model = assemble(record(NetWithMask(Masked()), inputs, ("out",), SIZES), {}).model
    assert FlashAttention()(model).modified
    nodes = [node for function in model.functions.values() for node in function]
    assert [node.outputs[0].shape for node in nodes if node.op_type == "Attention"] == [None, None]
    assert not [node for node in nodes if node.domain]
    ir.save(model, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for batch, tokens in ((1, 1), (2, 17), (1, 130)):
        generator = torch.Generator().manual_seed(tokens)
        given = [torch.randn(batch, tokens, WIDTH, generator=generator) for _ in range(3)]
        mask = (torch.rand(tokens, tokens, generator=generator) < 0.5) | torch.eye(tokens, dtype=torch.bool)
        feeds = dict(zip(("query", "key", "value", "mask"), (*given, mask), strict=True))
        (found,) = session.run(None, {name: value.numpy() for name, value in feeds.items()})
        expected = NetWithMask(Masked())(*given, mask).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [Turned, Rotated, OneHead, Causal, Grouped])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 17), (1, 130)])
def test_what_it_gives(block, batch, tokens, tmp_path):
    names = ("query", "key", "value")
    inputs = tuple(Input(name, torch.float32, TOKENS) for name in names)
    net: type[Net] = NetOfThree
    if block is Rotated:
        inputs += tuple(Input(name, torch.float32, HALF) for name in ("cos", "sin"))
        net = NetWithTables
    with torch.device("meta"):
        plan = record(net(block()), inputs, ("out",), SIZES)
    model = assemble(plan, {}).model
    assert FlashAttention()(model).modified
    kinds = [node.op_type for function in model.functions.values() for node in function]
    wanted = "GroupQueryAttention" if block in (Causal, Grouped) else "MultiHeadAttention"
    assert "Attention" not in kinds
    assert kinds.count(wanted) == 1
    if block is Rotated:
        assert "Transpose" not in kinds
    ir.save(model, tmp_path / "net.onnx")
    generator = torch.Generator().manual_seed(tokens)
    shapes = [[{"batch": batch, "tokens": tokens}.get(d, d) for d in each.shape] for each in inputs]
    given = [torch.randn(*shape, generator=generator) for shape in shapes]
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {each.name: value.numpy() for each, value in zip(inputs, given, strict=True)})
    np.testing.assert_allclose(found, net(block())(*given).numpy(), rtol=1e-4, atol=1e-5)
