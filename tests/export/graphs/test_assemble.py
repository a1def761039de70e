"""Graphs assembled from traced blocks: right, small, legible, and pointing into the weight files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from tests.reference import randomize
from zimgkit.engines.bundle import TensorSpec
from zimgkit.engines.tensors import safetensors
from zimgkit.export.graphs.assemble import assemble, assemble_all
from zimgkit.export.graphs.plan import Plan, record
from zimgkit.export.networks import qwen_image, text_encoder, z_image
from zimgkit.export.networks.parts import Input, Part

Z_IMAGE = {
    "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 48, "n_layers": 3,
    "n_refiner_layers": 2, "n_heads": 3, "n_kv_heads": 3, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 16,
    "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [8, 4, 4], "axes_lens": [1536, 512, 512],
}  # fmt: skip
QWEN_IMAGE = {
    "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16,
    "num_attention_heads": 3, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4),
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
PARTS = {
    "z-image conditioner": z_image.parts(Z_IMAGE)["conditioner"],
    "z-image denoiser": z_image.parts(Z_IMAGE)["denoiser"],
    "qwen-image conditioner": qwen_image.parts(QWEN_IMAGE)["conditioner"],
    "qwen-image denoiser": qwen_image.parts(QWEN_IMAGE)["denoiser"],
    "qwen3": text_encoder.parts(QWEN3)["text_encoder"],
}
SMALLER = {"batch": 1, "image_tokens": 32, "caption_tokens": 32, "text_tokens": 3, "tokens": 5}
LARGER = {"batch": 3, "image_tokens": 128, "caption_tokens": 96, "text_tokens": 61, "tokens": 77}


def all_tokens(sizes: dict[str, int], part: Part) -> dict[str, int]:
    names = {side for entry in part.inputs for side in entry.shape}
    prompt = "caption_tokens" if "caption_tokens" in names else "text_tokens"
    return sizes | {"all_tokens": sizes["image_tokens"] + sizes[prompt]}


def real(part: Part, seed: int) -> nn.Module:
    """The network with random weights, on the CPU."""
    network = part.network()
    randomize(network, seed)
    return network.eval()


def plan_of(part: Part, dtype: torch.dtype = torch.float32) -> Plan:
    """What a part's network calls."""
    return record(part.build(dtype), part.inputs, part.outputs, part.sizes)


def store(network: nn.Module, folder: Path, dtype: str = "float32") -> dict[str, safetensors.TensorInfo]:
    """Write a network's parameters as a checkpoint would, under names of its own."""
    state = {name: value.detach().to(getattr(torch, dtype)) for name, value in network.state_dict().items()}
    bits = {n: (v.view(torch.int16) if dtype == "bfloat16" else v).numpy() for n, v in state.items()}
    infos = safetensors.write(
        folder / "weights.safetensors",
        {f"stored.{name}": (dtype, value.shape) for name, value in state.items()},
        {f"stored.{name}": [value] for name, value in bits.items()},
    )
    return {name: infos[f"stored.{name}"] for name in state}


def feeds(part: Part, sizes: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    result: dict[str, np.ndarray] = {}
    for entry in part.inputs:
        shape = tuple(entry.example(all_tokens(sizes, part)).shape)
        if entry.dtype == torch.int64:
            result[entry.name] = rng.integers(0, 300, shape)
        elif entry.dtype == torch.bool:
            result[entry.name] = np.arange(shape[0]) >= shape[0] - 2
        elif entry.name == "sin":
            result[entry.name] = np.sqrt(1 - result["cos"] ** 2)
        elif entry.name == "cos":
            result[entry.name] = rng.uniform(-1, 1, shape).astype(np.float32)
        else:
            result[entry.name] = rng.standard_normal(shape).astype(np.float32)
    return result


@pytest.mark.parametrize("name", PARTS)
def test_graph_computes_what_the_network_does(name, tmp_path):
    part = PARTS[name]
    network = real(part, 1)
    assembled = assemble(plan_of(part), store(network, tmp_path))
    model, (spec,) = assembled.model, assembled.outputs.values()
    assert spec.dtype == "float32"
    ir.save(model, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    assert [entry.name for entry in session.get_outputs()] == [*part.outputs]
    for seed, sizes in enumerate((SMALLER, LARGER, part.sizes[0])):
        inputs = feeds(part, {**SMALLER, **sizes}, seed)
        with torch.inference_mode():
            expected = network(*(torch.from_numpy(value) for value in inputs.values())).numpy()
        found = session.run(None, inputs)[0]
        assert found.shape == expected.shape
        named = all_tokens({**SMALLER, **sizes}, part)
        assert found.shape == tuple(named[side] if isinstance(side, str) else side for side in spec.shape)
        assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", PARTS)
def test_bfloat16_weights_computed_in_float32(name, tmp_path):
    """What a CPU runs of a bfloat16 bundle: the same network from rounded weights."""
    part = PARTS[name]
    network = real(part, 2)
    infos = store(network, tmp_path, "bfloat16")
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model = assemble(plan_of(part), infos).model
    ir.save(model, tmp_path / "model.onnx")
    inputs = feeds(part, SMALLER, 0)
    with torch.inference_mode():
        expected = network(*(torch.from_numpy(value) for value in inputs.values())).numpy()
    found = ort.InferenceSession(str(tmp_path / "model.onnx")).run(None, inputs)[0]
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def test_rows_of_an_embedding_are_cast_not_all_of_it(tmp_path):
    part = PARTS["qwen3"]
    model = assemble(plan_of(part), store(real(part, 2), tmp_path, "bfloat16")).model
    (function,) = (found for found in model.functions.values() if any(node.op_type == "Gather" for node in found))
    (gather,) = (node for node in function if node.op_type == "Gather" and node.inputs[0] in function.inputs)
    assert [node.op_type for node, _ in gather.inputs[0].uses()] == ["Gather"]
    assert [node.op_type for node, _ in gather.outputs[0].uses()] == ["Cast"]


@pytest.mark.parametrize("name", PARTS)
def test_blocks_are_traced_once_and_stay_legible(name, tmp_path):
    part = PARTS[name]
    network = part.build(torch.bfloat16)
    infos = store(real(part, 0), tmp_path, "bfloat16")
    model = assemble(record(network, part.inputs, part.outputs, part.sizes), infos).model
    functions = {function.name: function for function in model.functions.values()}
    kinds = {type(child).__name__ for child in network.modules()}
    assert set(functions) <= kinds  # No kind was traced twice.
    for function in functions.values():
        operators = [node.op_type for node in function if node.op_type != "Constant"]
        assert len(list(function)) < 100
        assert Counter(operators)["Attention"] == (function.name.endswith(("Block", "Qwen3Layer")))
        assert "Softmax" not in operators
        assert "ReduceMean" not in operators  # Norms are single operators.
    calls = Counter(node.op_type for node in model.graph)
    if name == "z-image denoiser":
        assert calls["ZImageBlock"] == 5
    if name == "qwen-image denoiser":
        assert calls["QwenImageBlock"] == 3
    if name == "qwen3":
        assert calls["Qwen3Layer"] == 3  # The last of four is unused.


def test_initializers_are_the_checkpoints_tensors(tmp_path):
    part = PARTS["z-image denoiser"]
    infos = store(real(part, 0), tmp_path)
    model = assemble(plan_of(part), infos).model
    found = model.graph.initializers
    assert set(found) == {info.name for info in infos.values()}
    for info in infos.values():
        data = found[info.name].const_value
        assert (data.location, data.offset, data.length) == ("weights.safetensors", info.offset, info.nbytes)
        assert tuple(data.shape) == info.shape
    ir.save(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size < 100_000  # No weight went into the graph.


class Constants(nn.Module):
    """Each of its numbers becomes an initializer, which a function has not."""

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number in range(8):
                x = torch.cat([x, torch.full_like(x[:1], number + 0.5)]).sum(0, keepdim=True) * (number + 1.25)
            return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


def test_the_same_bytes_every_time(tmp_path):
    inputs = (Input("x", torch.float32, (1, "n")),)
    made = [
        ir.to_proto(assemble(plan, {}, tmp_path).model).SerializeToString()
        for plan in [record(Constants(), inputs, ("y",), ({"n": 48}, {"n": 96})) for _ in range(3)]
    ]
    assert made[0].count(b"Constant") >= 8
    assert made == made[:1] * 3


class Halves(nn.Module):
    """Two results of one child, one of another; the second is repeated eight times."""

    class Halve(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.bfloat16(), x.repeat(1, 8)

    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x

    def __init__(self) -> None:
        super().__init__()
        self.split, self.sum = self.Halve(), self.Double()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        low, wide = self.split(x)
        return self.sum(wide), low, wide


def test_several_outputs(tmp_path):
    sizes = ({"rows": 6, "columns": 10}, {"rows": 9, "columns": 7})
    inputs = (Input("x", torch.float32, ("rows", "columns")),)
    assembled = assemble(record(Halves(), inputs, ("doubled", "low", "wide"), sizes), {}, tmp_path)
    assert assembled.outputs == {
        "doubled": TensorSpec("float32", ("rows", "8*columns")),
        "low": TensorSpec("bfloat16", ("rows", "columns")),
        "wide": TensorSpec("float32", ("rows", "8*columns")),
    }
    ir.save(assembled.model, tmp_path / "model.onnx")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    assert {entry.name: entry.type for entry in session.get_outputs()} == {
        "doubled": "tensor(float)", "low": "tensor(bfloat16)", "wide": "tensor(float)",
    }  # fmt: skip
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    doubled, wide = session.run(["doubled", "wide"], {"x": x})
    assert np.array_equal(doubled, 2 * np.tile(x, 8)) and np.array_equal(wide, np.tile(x, 8))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Halves.Double()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (y := self.child(x)), y


def test_one_value_returned_twice(tmp_path):
    plan = record(Twice(), (Input("x", torch.float32, ("n",)),), ("a", "b"), ({"n": 6}, {"n": 9}))
    with pytest.raises(RuntimeError, match="returns one value twice"):
        assemble(plan, {}, tmp_path)


def test_plans_that_share_modules_share_functions(tmp_path):
    part = PARTS["z-image denoiser"]
    infos = store(real(part, 0), tmp_path)
    one, other = assemble_all([plan_of(part), plan_of(part)], infos)
    assert list(one.model.functions) == list(other.model.functions)
    assert ir.to_proto(one.model) == ir.to_proto(other.model)
