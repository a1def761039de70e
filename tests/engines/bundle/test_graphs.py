"""Where a graph's tensors lie, against the onnx library."""

from __future__ import annotations

import random

import onnx
import pytest
from onnx import TensorProto, helper

from zimgkit.engines.bundle.graphs import External, with_locations


def external(name: str, location: str, **place: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **place}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def graph() -> onnx.ModelProto:
    """External tensors wherever ONNX allows one, and others between them."""
    values = helper.make_tensor("own", TensorProto.FLOAT, [2], [1, 2])
    sparse = helper.make_sparse_tensor(external("sparse", "s/a", length=24), external("indices", "s/b"), [2])
    inner = helper.make_graph([], "inner", [], [], [external("inner", "ü/ñ.safetensors", offset=8)])
    constant = helper.make_node("Constant", [], ["c"], value=external("constant", "w", offset=300, length=24))
    several = helper.make_node("If", ["b"], ["d"], then_branch=inner)
    inits = [external(f"w{i}", "weights.safetensors", offset=i * 24, length=24) for i in range(300)] + [values]
    outer = helper.make_graph([constant, several], "outer", [], [], inits, sparse_initializer=[sparse])
    function = helper.make_function("d", "f", [], ["c"], [constant], [helper.make_opsetid("", 23)])
    return helper.make_model(outer, functions=[function], doc_string="x" * 1000)


def moved(tensor: External) -> str:
    return f"{'far/' * 40}{tensor.location}"


def test_every_external_tensor_is_found():
    found: list[External] = []
    data = graph().SerializeToString()
    assert with_locations(data, lambda tensor: found.append(tensor) or tensor.location) is data
    assert sorted(found[-5:] + found[:5])[0] == External("constant", "w", 300, 24)
    assert {tensor.name for tensor in found} >= {"sparse", "indices", "inner", "constant", "w0", "w299"}
    assert len(found) == 305 and External("inner", "ü/ñ.safetensors", 8, None) in found


def test_locations_alone_change():
    old = graph()
    new = onnx.ModelProto.FromString(with_locations(old.SerializeToString(), moved))
    back = with_locations(new.SerializeToString(), lambda tensor: tensor.location.removeprefix("far/" * 40))
    assert new != old and onnx.ModelProto.FromString(back) == old
    assert new.graph.initializer[3] == external("w3", f"{'far/' * 40}weights.safetensors", offset=72, length=24)


def test_some_of_them():
    data = with_locations(graph().SerializeToString(), lambda t: "there" if t.name == "inner" else t.location)
    wanted = graph()
    wanted.graph.node[1].attribute[0].g.initializer[0].external_data[0].value = "there"
    assert onnx.ModelProto.FromString(data) == wanted


@pytest.mark.parametrize("place", [{"offset": -8}, {"offset": "x"}, {"length": "1e3"}, {"offset": "9" * 5000}])
def test_places_that_are_none(place):
    model = helper.make_model(helper.make_graph([], "g", [], [], [external("w", "file", **place)]))
    with pytest.raises(ValueError, match="no place in a file"):
        with_locations(model.SerializeToString(), moved)


def test_graphs_within_graphs_without_end():
    inner = helper.make_graph([], "g", [], [], [external("w", "file")])
    for _ in range(18):
        inner = helper.make_graph([helper.make_node("If", ["b"], ["d"], then_branch=inner)], "g", [], [])
    with pytest.raises(ValueError, match="too deep"):
        with_locations(helper.make_model(inner).SerializeToString(), moved)


def test_bytes_that_are_no_graph():
    """Any change of any byte is passed or refused, and nothing else happens."""
    rng, data = random.Random(0), graph().SerializeToString()
    for _ in range(60):
        broken = bytearray(data[: rng.randrange(len(data))])
        for _ in range(3):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            with_locations(bytes(broken), moved)
        except ValueError as error:
            assert "\n" not in str(error)
