"""Opening engines by name, and the check that every backend makes of its inputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests import handmade
from zimgkit.engines import base
from zimgkit.engines.base import BACKENDS, Handle, check_feeds, open_engine
from zimgkit.engines.bundle import Bundle, TensorSpec
from zimgkit.engines.errors import BackendError, BundleError, UsageError

INPUTS = {
    "hidden_states": TensorSpec("float32", (1, "tokens", 4)),
    "input_ids": TensorSpec("int64", (1, "length")),
    "pad": TensorSpec("bool", ("tokens",)),
    "scale": TensorSpec("float32", ()),
}


DENOISER: Any = SimpleNamespace(name="denoiser", inputs=INPUTS, backend="torch", device="cuda:1")
"""As much of an engine as the check looks at."""


def feeds(**changes: Any) -> dict[str, Any]:
    fitting = {
        "hidden_states": np.zeros((1, 3, 4), np.float32),
        "input_ids": np.zeros((1, 7), np.int64),
        "pad": np.zeros(3, bool),
        "scale": np.array(1, np.float32),
    }
    return fitting | changes


def handle(dtype: str, shape: tuple[int, ...], backend: str = "torch", device: str = "cuda:1") -> Handle:
    return Handle(backend, device, dtype, shape, object())


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return Bundle.open(handmade.write_bundle(tmp_path, {"net.safetensors": b""}))


@pytest.mark.parametrize("backend", ["coreml", "", "auto", "ONNXRuntime", "zimgkit.engines.torch.engine"])
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
        {"pad": handle("bool", (3,)), "input_ids": handle("int64", (1, 9))},
    ],
    ids=["plain", "another size", "a view", "handles of a device"],
)
def test_what_fits(changes):
    given = feeds(**changes)
    tokens = given["hidden_states"].shape[1]
    given["pad"] = given["pad"] if tokens == 3 else np.zeros(tokens, bool)
    assert check_feeds(DENOISER, given) == {"tokens": tokens, "length": given["input_ids"].shape[1]}


def test_bfloat16():
    """Arrays are given in float32, handles in bfloat16."""
    inputs = {"x": TensorSpec("bfloat16", ("n",))}
    engine: Any = SimpleNamespace(name="net", inputs=inputs, backend="torch", device="cuda:1")
    for value in (np.zeros(2, np.float32), handle("bfloat16", (2,))):
        assert check_feeds(engine, {"x": value}) == {"n": 2}
    with pytest.raises(BackendError, match="net takes 'x' in bfloat16, not float32"):
        check_feeds(engine, {"x": handle("float32", (2,))})
    with pytest.raises(BackendError, match="net takes 'x' in float32, not uint16"):
        check_feeds(engine, {"x": np.zeros(2, np.uint16)})


@pytest.mark.parametrize("name", INPUTS)
def test_missing(name):
    given = feeds()
    del given[name]
    with pytest.raises(BackendError, match=f"^denoiser needs the input '{name}'$"):
        check_feeds(DENOISER, given)


def test_unknown():
    with pytest.raises(BackendError) as caught:
        check_feeds(DENOISER, feeds(timestep=np.zeros(1, np.float32)))
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
        check_feeds(DENOISER, feeds(**{name: np.zeros(shape, INPUTS[name].dtype)}))
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
        check_feeds(DENOISER, feeds(**{name: value}))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (handle("float32", (1, 3, 5)), r"denoiser takes 'hidden_states' in the shape .*, not \(1, 3, 5\)"),
        (handle("float32", (1, 4, 4)), "denoiser got 'pad' of 3 tokens, and another input of 4"),
        (handle("bfloat16", (1, 3, 4)), "denoiser takes 'hidden_states' in float32, not bfloat16"),
        (
            handle("float32", (1, 3, 4), device="cuda:0"),
            "denoiser runs with torch on cuda:1, and got 'hidden_states' of torch on cuda:0; download it there, and",
        ),
        (handle("float32", (1, 3, 4), "tensorrt"), "and got 'hidden_states' of tensorrt on cuda:1"),
        (
            [[[1, 2, 3, 4]]],
            "denoiser takes 'hidden_states' as a numpy array, or as a handle of torch on cuda:1, not as list",
        ),
    ],
)
def test_handles_that_do_not_fit(value, message):
    with pytest.raises(BackendError, match=message):
        check_feeds(DENOISER, feeds(hidden_states=value))


def test_two_sizes_of_one_dimension():
    with pytest.raises(BackendError) as caught:
        check_feeds(DENOISER, feeds(pad=np.zeros(4, bool)))
    assert str(caught.value) == "denoiser got 'pad' of 4 tokens, and another input of 3"
