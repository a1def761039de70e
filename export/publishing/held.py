"""A bundle as the checkpoint it is: every tensor by its canonical name, with LoRAs in it, hoisted parts back in one.

Linked files are the checkpoint's own, and give also what no picture needs. Quantized weights are multiplied out, and
kernels that were folded for still images are unfolded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zimgkit.engines.bundle import Bundle
from zimgkit.engines.errors import BundleError, CheckpointError, ZimgError
from zimgkit.engines.tensors.dtypes import BY_NAME, float32_to_bfloat16, to_float32
from zimgkit.engines.tensors.safetensors import TensorInfo, view
from zimgkit.export.checkpoints.checkpoint import Checkpoint, open_origin, origins
from zimgkit.export.checkpoints.layouts import canonical
from zimgkit.export.checkpoints.stored import Stored
from zimgkit.export.networks import registry
from zimgkit.export.networks.parts import Part, stored_shapes
from zimgkit.export.quantization.quantized_weights import WEIGHT_SCALE, dequantized
from zimgkit.export.weights.stream import PIECE, Wanted, pieces, read_pieces
from zimgkit.runtime import demo_models


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that is made when it is written."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[NDArray[Any]]]
    """Its values in order, in storage type, a piece of it in memory at a time."""

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return int(np.prod(self.shape, dtype=np.int64)) * BY_NAME[self.dtype].storage.itemsize


Tensors = dict[str, HeldTensor]
"""Canonical name -> tensor."""


@dataclass(frozen=True)
class Held:
    """What a bundle holds of one component of a checkpoint."""

    tensors: Tensors
    absent: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The tensors and their shapes that the network has beside those, and no picture of the bundle's tasks needs."""
    dequantized: int = 0
    """How many were quantized."""
    unfolded: int = 0
    """How many have zeros where a video would need other numbers."""


def checkpoint_of(bundle: Bundle, model: str | None = None) -> Checkpoint | None:
    """The checkpoint that a bundle was built from, for what the bundle has not.

    Args:
        bundle: an open bundle.
        model: where it is now, if not there; nothing is fetched unless it is named.

    Raises:
        CheckpointError: the one that is named cannot be opened, or is another one.
    """
    place = bundle.manifest.checkpoint.model
    if model is None and not os.path.lexists(demo_models.locate(place)):
        return None
    try:
        checkpoint = open_origin(bundle.manifest, model)
    except ZimgError:
        if model is not None:
            raise
        return None
    if origins(checkpoint.sources) == origins(bundle.manifest.sources):
        return checkpoint
    if model is not None:
        raise CheckpointError(f"{model} is not the checkpoint that {bundle.root} was built from", "name its own")
    return None


def held(bundle: Bundle, checkpoint: Checkpoint | None = None) -> dict[str, Held]:
    """What a bundle holds, by components of its checkpoint; no weights are read, but those of folded kernels.

    Args:
        bundle: an open bundle.
        checkpoint: the one it was built from, which gives what the bundle has not.

    Raises:
        BundleError: a tensor is missing.
    """
    manifest = bundle.manifest
    sources = registry.sources(manifest.family, manifest.tasks)
    return {source: _component(bundle, checkpoint, source) for source in sources}


def config_of(bundle: Bundle, checkpoint: Checkpoint | None, source: str) -> dict[str, Any]:
    """The config of one component: the checkpoint's, or that of what the bundle has of it."""
    if checkpoint is not None:
        return checkpoint.config(source)
    whole = getattr(registry.module(bundle.manifest.family, source), "whole_config", dict)
    config: dict[str, Any] = whole(bundle.manifest.config[source])
    return config


def _component(bundle: Bundle, checkpoint: Checkpoint | None, source: str) -> Held:
    manifest = bundle.manifest
    config = config_of(bundle, checkpoint, source)
    parts = registry.parts(manifest.family, source, config, manifest.tasks)
    parts = {name: part for name, part in parts.items() if name in manifest.components}
    found: Tensors = {}
    origin = {} if checkpoint is None else checkpoint.tensors(source)
    plain: set[str] = set()
    quantized: set[str] = set()
    unfolded = 0
    for name, part in parts.items():
        stored = {canonical(source, tensor): info for tensor, info in bundle.tensors(name).items()}
        for parameter in part.parameters():
            whose, tensor = part.origin(parameter)
            if whose != source or tensor in plain:
                continue
            if tensor not in stored:
                raise BundleError(f"{bundle.root} has no tensor {tensor!r} of its {name}", "build the bundle again")
            if parameter in part.restores:
                found[tensor], is_exact = _unfolded(part, parameter, stored[tensor], origin.get(tensor))
                unfolded += not is_exact
                plain.add(tensor)
            elif whole := dequantized(bundle, name, stored[tensor].name):
                quantized.add(tensor)
                found[tensor] = _multiplied_out(bundle, name, stored[tensor].name, whole[0])
            else:
                found[tensor] = _as_it_is(stored[tensor])
                plain.add(tensor)
        names = bundle.tensors(name).keys()
        others = {tensor: info for tensor, info in stored.items() if not _is_scale(info.name, names)}
        found |= {tensor: _as_it_is(info) for tensor, info in others.items() if tensor not in found}
    absent = {name: shape for name, shape in _shapes(bundle, source, config).items() if name not in found}
    if checkpoint is not None:
        absent |= {name: info.shape for name, info in origin.items() if name not in found}
        found |= {name: _cast(origin[name], manifest.precision) for name in absent if name in origin}
        absent = {name: shape for name, shape in absent.items() if name not in found}
    return Held(found, absent, len(quantized - plain), unfolded)


def _shapes(bundle: Bundle, source: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """All that the network of a component has, where its config describes all of it."""
    family, tasks = bundle.manifest.family, bundle.manifest.tasks
    shapes = stored_shapes(registry.parts(family, source, config, tasks))
    if whole := getattr(registry.module(family, source), "checkpoint_shapes", None):
        shapes |= whole(config)
    return {canonical(source, name): shape for name, shape in shapes.items()}


def _is_scale(name: str, names: Any) -> bool:
    """Whether a tensor belongs to a quantized one, after which it is named."""
    base = name.rpartition(".")[0]
    return base in names and base + WEIGHT_SCALE in names


def _as_it_is(info: TensorInfo) -> HeldTensor:
    return HeldTensor(info.dtype, info.shape, lambda: read_pieces(info))


def _cast(info: Stored, precision: str) -> HeldTensor:
    return HeldTensor(precision, info.shape, lambda: pieces(Wanted(info, info.shape), precision))


def zeros(shape: tuple[int, ...], precision: str) -> HeldTensor:
    """A tensor of zeros."""
    total, storage = int(np.prod(shape, dtype=np.int64)), BY_NAME[precision].storage

    def made() -> Iterator[NDArray[Any]]:
        for start in range(0, total, PIECE):
            yield np.zeros(min(PIECE, total - start), storage)

    return HeldTensor(precision, shape, made)


def _multiplied_out(bundle: Bundle, component: str, name: str, shape: tuple[int, ...]) -> HeldTensor:
    precision = bundle.manifest.precision

    def made() -> Iterator[NDArray[Any]]:
        for rows in (dequantized(bundle, component, name) or (shape, iter(())))[1]:
            yield float32_to_bfloat16(rows) if precision == "bfloat16" else rows

    return HeldTensor(precision, shape, made)


def _unfolded(part: Part, parameter: str, info: TensorInfo, origin: Stored | None) -> tuple[HeldTensor, bool]:
    """A kernel as the checkpoint has it, and whether it is exactly that: from there, or from its fold."""
    shape = part.transformed_shapes[parameter]
    fold = to_float32(np.array(view(info)), info.dtype)
    if origin is not None and origin.shape == shape:
        whole = _cast(origin, info.dtype)
        values = to_float32(np.concatenate([*whole.pieces()]), info.dtype).reshape(shape)
        if np.array_equal(part.transforms[parameter](values), fold):
            return whole, True

    def made() -> Iterator[NDArray[Any]]:
        values = part.restores[parameter](np.array(view(info)), shape)
        yield values.reshape(-1)

    return HeldTensor(info.dtype, shape, made), fold.size == np.prod(shape)
