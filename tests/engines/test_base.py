"""Opening engines by name, and the check that every backend makes of its inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import handmade
from zimgkit.engines import base
from zimgkit.engines.base import BACKENDS, check_feeds, open_engine
from zimgkit.engines.bundle import Bundle, TensorSpec
from zimgkit.engines.errors import BackendError, BundleError, UsageError

INPUTS = {
    "hidden_states": TensorSpec("float32", (1, "tokens", 4)),
    "input_ids": TensorSpec("int64", (1, "length")),
    "pad": TensorSpec("bool", ("tokens",)),
    "scale": TensorSpec("float32", ()),
}


def feeds(**changes: Any) -> dict[str, Any]:
    fitting = {
        "hidden_states": np.zeros((1, 3, 4), np.float32),
        "input_ids": np.zeros((1, 7), np.int64),
        "pad": np.zeros(3, bool),
        "scale": np.array(1, np.float32),
    }
    return fitting | changes


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return Bundle.open(handmade.write_bundle(tmp_path, {"net.safetensors": b""}))


@pytest.mark.parametrize("backend", ["openvino", "", "ONNXRuntime", "zimgkit.engines.torch.engine"])
def test_unknown_backend(bundle, backend):
    with pytest.raises(UsageError) as caught:
        open_engine(bundle, "net", backend)
    assert str(caught.value) == f"no backend is called {backend!r}; choose one of {', '.join(BACKENDS)}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_refuses_a_component_it_cannot_run(bundle, backend):
    device = "cuda" if backend.startswith("tensorrt") else "cpu"
    with pytest.raises(BundleError, match="no component 'lost', only net"):
        open_engine(bundle, "lost", backend, device)
    with pytest.raises(BackendError, match=r"net'? is a table of tensors and has no graph to run"):
        open_engine(bundle, "net", backend, device)
    with pytest.raises(UsageError, match="'toaster'"):
        open_engine(bundle, "net", backend, "toaster")


def test_the_arguments_go_to_the_backend(bundle, monkeypatch):
    class Module:
        @staticmethod
        def open_engine(*arguments: Any) -> Any:
            return arguments

    monkeypatch.setattr(
        base, "import_module", {"zimgkit.engines.onnxruntime.engine": Module, "zimgkit.engines.torch.engine": None}.get
    )
    assert open_engine(bundle, "net") == (bundle, "net", None)
    assert open_engine(bundle, "net", "onnxruntime", "cuda:1") == (bundle, "net", "cuda:1")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_states": np.zeros((1, 1, 4), np.float32)},
        {"hidden_states": np.zeros((1, 4, 5), np.float32).transpose(0, 2, 1)},
        {"pad": object(), "input_ids": "a handle"},
    ],
    ids=["plain", "another size", "a view", "handles of a device"],
)
def test_what_fits(changes):
    check_feeds("denoiser", INPUTS, feeds(**changes))


@pytest.mark.parametrize("name", INPUTS)
def test_missing(name):
    given = feeds()
    del given[name]
    with pytest.raises(BackendError, match=f"^denoiser needs the input '{name}'$"):
        check_feeds("denoiser", INPUTS, given)


def test_unknown():
    with pytest.raises(BackendError) as caught:
        check_feeds("denoiser", INPUTS, feeds(timestep=np.zeros(1, np.float32)))
    assert str(caught.value) == "denoiser has no input 'timestep'; it has hidden_states, input_ids, pad, scale"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("hidden_states", (2, 3, 4)), ("hidden_states", (1, 3, 5)), ("hidden_states", (3, 4)),
        ("hidden_states", (1, 3, 4, 1)), ("hidden_states", ()), ("input_ids", (7,)), ("scale", (1,)),
    ],
)  # fmt: skip
def test_misshapen(name, shape):
    with pytest.raises(BackendError) as caught:
        check_feeds("denoiser", INPUTS, feeds(**{name: np.zeros(shape, INPUTS[name].dtype)}))
    assert str(caught.value) == f"denoiser takes {name!r} in the shape {INPUTS[name].shape}, not {shape}"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("hidden_states", "float64"), ("hidden_states", "float16"), ("hidden_states", ">f4"), ("input_ids", "int32"),
        ("input_ids", "uint64"), ("pad", "uint8"), ("pad", "float32"), ("scale", "int64"),
    ],
)  # fmt: skip
def test_wrong_element_type(name, dtype):
    value = feeds()[name].astype(dtype)
    with pytest.raises(BackendError, match=f"denoiser takes '{name}' in {INPUTS[name].dtype}, not {dtype}"):
        check_feeds("denoiser", INPUTS, feeds(**{name: value}))
