"""Every network of a test run is traced once: most of a build's time is the exporter's, and its result is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import onnx
import onnx_ir as ir
from filelock import FileLock

from zimg.engines.bundle import TensorSpec
from zimg.export.external import external


def once(original: Callable[..., Any], store: Path) -> Callable[..., Any]:
    """``assemble``, but what it made of a network before is taken from a folder; weights lie where they lie now."""

    def assemble(network: Any, inputs: Any, output: str, sizes: Any, tensors: Any, folder: Path) -> Any:
        path = store / f"{_fingerprint(network, inputs, output, sizes, tensors)}.onnx"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                made, made_spec = original(network, inputs, output, sizes, tensors, folder)
                path.with_suffix(".json").write_bytes(msgspec.json.encode(made_spec))
                part = path.with_suffix(".part")
                part.write_bytes(ir.to_proto(made).SerializeToString())
                part.rename(path)
        model = ir.from_proto(onnx.ModelProto.FromString(path.read_bytes()))
        infos = {info.name: info for info in tensors.values()}
        for name, value in model.graph.initializers.items():
            value.const_value = external(infos[name], folder, value.dtype, value.shape)
        return model, msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=TensorSpec)

    return assemble


def _fingerprint(network: Any, inputs: Any, output: str, sizes: Any, tensors: Any) -> str:
    """All that a graph depends on: modules with their numbers, parameters, inputs, and what initializers are called."""
    own = {name: _plain(module) for name, module in network.named_modules()}
    state = [(key, tuple(value.shape), str(value.dtype)) for key, value in network.state_dict().items()]
    stored = [(key, info.name, info.dtype, info.shape) for key, info in tensors.items()]
    of = repr((own, state, inputs, output, sizes, sorted(stored)))
    return hashlib.sha256(of.encode()).hexdigest()[:24]


def _plain(module: Any) -> Any:
    """A module's class and its attributes that are no parts of it."""
    hidden = {key: repr(value) for key, value in vars(module).items() if not key.startswith("_")}
    assert not any(" at 0x" in value for value in hidden.values()), hidden
    return type(module).__qualname__, module.extra_repr(), sorted(hidden.items())
