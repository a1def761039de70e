"""Weights that are streamed: the same numbers whatever the budget, and no more on the device than that."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from tests.engines.torch.test_engine import hand_written
from zimgkit.engines.bundle import TensorSpec
from zimgkit.engines.torch import streaming
from zimgkit.engines.torch.engine import TorchEngine, open_engine
from zimgkit.engines.torch.graph import Program, compile_graph, read_constant, run, run_together
from zimgkit.engines.torch.streaming import BUFFERS, Ring, stream_weights

FLOAT, WIDTH, BLOCKS = TensorProto.FLOAT, 16, 5
SIZE = WIDTH * WIDTH * 4
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LEAST", SIZE)


@pytest.fixture
def program() -> Program:
    """Five blocks, of two weights each, one of which all share in the first two."""
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("zimg", 1)]
    body = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("MatMul", ["t", "b"], ["y"]),
    ]
    function = helper.make_function("zimg", "Layer", ["x", "a", "b"], ["y"], body, imports)
    names = [("shared" if k < 2 else f"{k}.a", f"{k}.b") for k in range(BLOCKS)]
    calls = [
        helper.make_node("Layer", [f"x{k}", *pair], [f"x{k + 1}"], f"layers.{k}", domain="zimg")
        for k, pair in enumerate(names)
    ]
    torch.manual_seed(0)
    weights = [
        helper.make_tensor(name, FLOAT, [WIDTH, WIDTH], torch.randn(WIDTH * WIDTH).tolist())
        for name in dict.fromkeys(name for pair in names for name in pair)
    ]
    ends = [helper.make_tensor_value_info(name, FLOAT, ["n", WIDTH]) for name in ("x0", f"x{BLOCKS}")]
    graph = helper.make_graph(calls, "g", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=imports, functions=[function])
    return compile_graph(ir.from_proto(model), partial(read_constant, None, ""), CPU)


def on_device(program: Program) -> int:
    """Bytes of weights and buffers."""
    rings = {id(step.call.func.__self__): step.call.func.__self__ for step in program.steps if is_copy(step)}
    buffers = [buffer for ring in rings.values() for buffer in ring._buffers]
    return sum(value.nbytes for value in [*program.slots, *buffers] if value is not None)


def is_copy(step: object) -> bool:
    return getattr(step, "label", "").startswith("a copy of weights")


@pytest.mark.parametrize(
    ("budget", "copies"),
    [(9 * SIZE, 0), (8 * SIZE, 3), (7 * SIZE, 3), (6 * SIZE, 4), (5 * SIZE, 5), (0, 5)],
)
@torch.inference_mode()
def test_any_budget(program: Program, budget: int, copies: int) -> None:
    """Nine weights. The shared one stays; the ring holds two blocks of two."""
    streamed = stream_weights(program, budget, CPU)
    assert sum(map(is_copy, streamed.steps)) == copies
    assert on_device(streamed) <= max(budget, 5 * SIZE)
    for rows in (1, 7, 3):
        feeds = {"x0": torch.randn(rows, WIDTH)}
        expected, found = run(program, feeds), run(streamed, feeds)
        assert torch.equal(found[f"x{BLOCKS}"], expected[f"x{BLOCKS}"])


@torch.inference_mode()
def test_after_a_run_that_failed(program: Program) -> None:
    """It had entered some blocks, and fetched others."""
    streamed = stream_weights(program, 0, CPU)
    feeds = {"x0": torch.randn(2, WIDTH)}
    expected = run(program, feeds)[f"x{BLOCKS}"]
    for end in range(1, len(streamed.steps)):
        run(streamed._replace(steps=streamed.steps[:end], outputs={}), feeds)
        assert torch.equal(run(streamed, feeds)[f"x{BLOCKS}"], expected)


@pytest.mark.parametrize(("budget", "blocks"), [(0, 5), (8 * SIZE, 3), (9 * SIZE, 0)])
@torch.inference_mode()
def test_sets_that_run_together_share_the_copies(program: Program, budget: int, blocks: int) -> None:
    streamed = stream_weights(program, budget, CPU)
    rings = {step.call.func.__self__ for step in streamed.steps if is_copy(step)}
    for count in (1, 3):
        entered = sum(ring._entered for ring in rings)
        sets = [{"x0": torch.randn(rows, WIDTH)} for rows in range(1, count + 1)]
        for found, feeds in zip(run_together(streamed, sets), sets, strict=True):
            assert torch.equal(found[f"x{BLOCKS}"], run(program, feeds)[f"x{BLOCKS}"])
        assert sum(ring._entered for ring in rings) == entered + blocks


def test_an_engine_that_streams_copies_once_for_sets_that_run_together(tmp_path: Path, program: Program) -> None:
    bundle = hand_written(tmp_path, "float32")
    streamed = stream_weights(program, 0, CPU)
    specs = [{name: TensorSpec("float32", ("n", WIDTH))} for name in (*program.inputs, *program.outputs)]
    component = msgspec.structs.replace(bundle.manifest.components["net"], inputs=specs[0], outputs=specs[1])
    rng = np.random.default_rng(0)
    sets = [{"x0": rng.standard_normal((rows, WIDTH)).astype(np.float32)} for rows in (3, 5)]
    entered = {}
    for streams in (False, True):
        engine = TorchEngine("net", component, streamed, CPU, "", streams=streams)
        (ring,) = {step.call.func.__self__ for step in streamed.steps if is_copy(step)}
        before = ring._entered
        for found, feeds in zip(engine.run_together(sets), sets, strict=True):
            np.testing.assert_array_equal(found[f"x{BLOCKS}"], engine.run(feeds)[f"x{BLOCKS}"])
        entered[streams] = ring._entered - before - len(sets) * BLOCKS
    assert entered == {False: 2 * BLOCKS, True: BLOCKS}


def test_a_block_is_fetched_while_the_one_before_it_runs() -> None:
    blocks = [[torch.full((4,), k, dtype=torch.float32), torch.full((3,), k, dtype=torch.int8)] for k in range(3)]
    ring = Ring(blocks, CPU)
    for turn in range(7):
        number = turn % 3
        weights = ring.enter(number)
        assert all(torch.equal(found, given) for found, given in zip(weights, blocks[number], strict=True))
        assert ring._fetched == turn + BUFFERS
        ahead = ring._views((turn + 1) % 3, (turn + 1) % BUFFERS)
        assert torch.equal(ahead[0], blocks[(turn + 1) % 3][0])
        assert all(view.data_ptr() % 4 == 0 for view in weights)


@pytest.mark.parametrize(("budget", "copies"), [(None, 0), (1 << 20, 0), (64, 2)])
def test_an_engine_within_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int | None, copies: int
) -> None:
    """No such device here: the meta device shows what lies where."""
    monkeypatch.setattr(streaming, "LEAST", 256)
    bundle = hand_written(tmp_path, "float32")
    component = msgspec.structs.replace(bundle.manifest.components["net"], weight_bytes=2 * (256 + 32))
    manifest = msgspec.structs.replace(bundle.manifest, components={"net": component})
    engine = open_engine(replace(bundle, manifest=manifest, weights_budget=budget), "net", "meta")
    assert sum(map(is_copy, engine._program.steps)) == copies
    assert {value.device.type for value in engine._program.slots if value is not None} == {"meta"}
