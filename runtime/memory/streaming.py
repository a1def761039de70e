"""Weights that are streamed to the device, so that one bundle serves cards of every size. Untested on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec

from zimgkit.engines.bundle import Bundle, CompiledEngine
from zimgkit.runtime.memory.needs import BASE, on_host


def within(bundle: Bundle, backend: str, device: str | Mapping[str, str] | None, total: int) -> Bundle:
    """The bundle, with how much of their weights engines keep on the device.

    Args:
        bundle: an open bundle.
        backend: TensorRT, whose plans are told so, or PyTorch; others keep all.
        device: of all components or of each, as the user names them.
        total: bytes of the device that one engine may take, its working memory included.
    """
    devices = device.values() if isinstance(device, Mapping) else [device]
    if backend.startswith("torch") and not all(on_host(backend, each) for each in devices):
        return replace(bundle, weights_budget=total // 2)  # The other half is what it works with.
    if backend != "tensorrt":
        return bundle
    engines = tuple(_within(e, total) if e.backend == backend else e for e in bundle.manifest.engines)
    return replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, engines=engines))


def _within(engine: CompiledEngine, total: int) -> CompiledEngine:
    wanted = engine.weight_streaming_budget
    if not (engine.streamable or wanted is not None):
        return engine
    room = max(0, total - engine.memory_bytes - BASE)
    return msgspec.structs.replace(engine, weight_streaming_budget=room if wanted is None else min(wanted, room))
