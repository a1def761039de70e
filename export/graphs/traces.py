"""What was traced, kept in the user's cache: another precision, LoRA or size of a network needs no second trace.

A trace follows from code and shapes alone, never from weights. An entry is named by a hash of all of that; it is an
ONNX model of nothing but functions, with a checksum behind it: cut between two of them, it would still be a model.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError
from platformdirs import user_cache_path
from torch import nn
from transformers import PreTrainedConfig

from zimgkit.engines.files import replacing
from zimgkit.export.graphs.trace import DOMAIN, IR_VERSION, OPSET, Kind, trace
from zimgkit.runtime.disk_cache import cache_limit, make_room, sealed, unsealed

CODE = ("zimgkit.export.networks.", "torch.nn.", "transformers.")
"""Where the code of a module has to be: a hash of our sources and the packages' versions tell when it changes."""
PACKAGES = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript")


def traced(kinds: Sequence[Kind]) -> list[ir.Function]:
    """:func:`zimgkit.export.graphs.trace.trace`, or what it gave before for the same modules.

    Each kind is bounded like all that zimgkit caches, by ``ZIMG_CACHE_LIMIT``, and 0 switches this off. An entry that
    is damaged is made again. Where the cache cannot be written, or a module is not zimgkit's own, all is traced.

    Args:
        kinds: the modules.

    Raises:
        RuntimeError: the exporter fails; a bug in a network, never a user's fault.
        UsageError: ``ZIMG_CACHE_LIMIT`` is not a number of bytes.
    """
    from filelock import FileLock

    limit, key = cache_limit(), fingerprint(kinds)
    if key is None or not limit:
        return trace(kinds)
    folder = user_cache_path("zimgkit") / "traces"
    path = folder / f"{key}.onnx"
    if found := _load(path, len(kinds)):
        return found
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            # Another process may be tracing the same: its result comes sooner.
            stack.enter_context(FileLock(folder / f"{key}.lock"))
        if found := _load(path, len(kinds)):
            return found
        data = _as_bytes(trace(kinds))
        with contextlib.suppress(OSError):
            with replacing(path) as part:
                part.write_bytes(sealed(data))
            make_room(folder, limit)
    # Not what was traced, so that the first graph has the same bytes as later ones.
    return _functions(data)


def fingerprint(kinds: Sequence[Kind]) -> str | None:
    """A hash of all that the functions of some modules follow from; None where that is not known.

    Args:
        kinds: the modules.
    """
    described = []
    for kind in kinds:
        modules = {name: _described(module) for name, module in kind.module.named_modules()}
        if None in modules.values():
            return None
        state = [(name, tuple(value.shape), str(value.dtype)) for name, value in kind.module.state_dict().items()]
        inputs = [(tuple(entry.tensor.shape), str(entry.tensor.dtype), entry.dynamic) for entry in kind.inputs]
        described.append((kind.name, modules, state, inputs, kind.outputs))
    return hashlib.sha256(repr((_code(), described)).encode()).hexdigest()[:32]


@cache
def _code() -> tuple[str, ...]:
    """The versions of what traces, and a hash of our own sources that traces follow from."""
    digest, export = hashlib.sha256(), Path(__file__).parents[1]
    for path in (*sorted(export.glob("graphs/*.py")), *sorted(export.glob("networks/*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest(), *(version(name) for name in PACKAGES)


def _described(module: nn.Module) -> tuple[Any, ...] | None:
    """A module's class and its attributes that are no parts of it; None where these are not plain."""
    kind, own = type(module), sorted((key, value) for key, value in vars(module).items() if not key.startswith("_"))
    known = f"{kind.__module__}.".startswith(CODE) and _is_plain([value for _, value in own])
    return (kind.__module__, kind.__qualname__, own) if known else None


def _is_plain(value: object) -> bool:
    """Whether ``repr`` says all there is to say."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    if isinstance(value, PreTrainedConfig):
        return _is_plain(value.to_dict())
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _as_bytes(functions: Sequence[ir.Function]) -> bytes:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: 1}, name="traces")
    found: bytes = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=functions)).SerializeToString()
    return found


def _load(path: Path, count: int) -> list[ir.Function]:
    """The functions of an entry; none where it is not there, or damaged, or has not so many."""
    try:
        functions = _functions(unsealed(path.read_bytes()))
        os.utime(path)  # used now, in the eyes of make_room
    except (OSError, ValueError, DecodeError):
        return []
    return functions if len(functions) == count else []


def _functions(data: bytes) -> list[ir.Function]:
    return list(ir.from_proto(onnx.ModelProto.FromString(data)).functions.values())


_code()  # Now: sources edited during a build shall not name what older code traces.
