"""Inputs and calls that are added to a toy network's plan, against torch."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from zimgkit.engines.tensors import safetensors
from zimgkit.export.attachments.insert import add_input, insert_call
from zimgkit.export.components import wanted_by
from zimgkit.export.graphs.assemble import assemble
from zimgkit.export.graphs.plan import Plan, record
from zimgkit.export.networks.parts import Input, Part
from zimgkit.export.weights.stream import export_weights

SIZES = ({"tokens": 6, "hints": 10}, {"tokens": 9, "hints": 14})
INPUTS = (Input("x", torch.float32, ("tokens", 4)), Input("shift", torch.float32, (4,)))


class Block(nn.Module):
    """Two streams in, two out."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.proj(a)) + b, a - b


class Last(nn.Linear):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return super().forward(a * b)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.last = Last(4, 4)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        a, b = x, shift
        for block in self.layers:
            a, b = block(a, b)
        return self.last(a, b)


class Control(nn.Module):
    """Adds a projection of the mean of hints to a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 4)

    def forward(self, stream: Tensor, hint: Tensor) -> Tensor:
        return stream + self.proj(hint).mean(0)


class Squash(nn.Tanh):
    """A name that no ONNX operator has."""


def plan_of() -> Plan:
    with torch.device("meta"):
        return record(Toy(), INPUTS, ("y",), SIZES)


def controlled(plan: Plan) -> Plan:
    """Block 1's first stream gets what a control layer makes of a new input."""
    with torch.device("meta"):
        control = Control()
    plan = add_input(plan, Input("hint", torch.float32, ("hints", 3)))
    return insert_call(plan, "control.layers.0", control, (("layers.1", 0), "hint"), ("layers.1", 0))


def write(path, state):
    return safetensors.write(
        path,
        {name: ("float32", value.shape) for name, value in state.items()},
        {name: [value.numpy()] for name, value in state.items()},
    )


@torch.inference_mode()
def test_an_extra_blocks_output_is_added(tmp_path):
    """Its weights come from another file, in which they have the names of others."""
    torch.manual_seed(0)
    toy, control = Toy(), Control()
    write(tmp_path / "model.safetensors", toy.state_dict())
    write(tmp_path / "control.safetensors", {f"layers.0.{n}": v for n, v in control.state_dict().items()})
    plan = controlled(plan_of())
    part = Part("model", shapes=plan.parameters(), other_sources={"control.": "controlnet"})
    assert part.stored_shapes("controlnet") == {"layers.0.proj.weight": (4, 3), "layers.0.proj.bias": (4,)}
    sources = {"model": tmp_path / "model.safetensors", "controlnet": tmp_path / "control.safetensors"}
    wanted = wanted_by(lambda source: safetensors.read_header(sources[source]), part)
    (tmp_path / "out").mkdir()
    placed = export_weights({"toy": wanted}, "float32", tmp_path / "out")["toy"]
    names = {info.name for info in safetensors.read_header(tmp_path / "out" / "toy.safetensors").values()}
    assert {"control.layers.0.proj.weight", "control.layers.0.proj.bias"} <= names

    ir.save(assemble(plan, placed, tmp_path / "out").model, tmp_path / "out" / "toy.onnx")
    session = ort.InferenceSession(tmp_path / "out" / "toy.onnx")
    assert [entry.name for entry in session.get_inputs()] == ["x", "shift", "hint"]
    for tokens, hints in ((2, 5), (7, 3)):
        x, shift, hint = torch.randn(tokens, 4), torch.randn(4), torch.randn(hints, 3)
        a, b = x, shift
        for index, block in enumerate(toy.layers):
            a, b = block(a, b)
            a = control(a, hint) if index == 1 else a
        (found,) = session.run(None, {"x": x.numpy(), "shift": shift.numpy(), "hint": hint.numpy()})
        assert np.abs(found - toy.last(a, b).numpy()).max() < 1e-5
        assert np.abs(found - toy(x, shift).numpy()).max() > 1e-2


def test_the_plan_stays_as_it_is():
    plan = plan_of()
    before = (str(plan.graph), plan.inputs, set(plan.modules))
    controlled(plan)
    assert (str(plan.graph), plan.inputs, set(plan.modules)) == before


@torch.inference_mode()
def test_what_the_plan_returns_is_replaced_too(tmp_path):
    torch.manual_seed(1)
    toy = Toy()
    infos = write(tmp_path / "model.safetensors", toy.state_dict())
    with torch.device("meta"):
        plan = insert_call(plan_of(), "squash", Squash(), ("last",), "last")
    ir.save(assemble(plan, infos, tmp_path).model, tmp_path / "toy.onnx")
    x, shift = torch.randn(3, 4), torch.randn(4)
    (found,) = ort.InferenceSession(tmp_path / "toy.onnx").run(None, {"x": x.numpy(), "shift": shift.numpy()})
    assert np.abs(found - toy(x, shift).tanh().numpy()).max() < 1e-5


def test_what_is_not_there():
    plan = plan_of()
    with pytest.raises(ValueError, match="has an input 'x' already"):
        add_input(plan, INPUTS[0])
    with pytest.raises(ValueError, match="calls 'last' already"):
        insert_call(plan, "last", nn.Tanh(), ("x",), "x")
    with pytest.raises(KeyError, match=r"no input and no call 'layers\.3'"):
        insert_call(plan, "more", nn.Tanh(), ("layers.3",), "last")
