"""Weights that a plan streams to the device, so that one plan serves cards of every size. Untested on a GPU."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from zimgkit.engines.bundle import Bundle, CompiledEngine
from zimgkit.runtime.memory.needs import BASE


def within(bundle: Bundle, backend: str, total: int) -> Bundle:
    """The bundle, its plans told how much of their weights stay on the device.

    Args:
        bundle: an open bundle.
        backend: whose plans.
        total: bytes of the device that one engine may take, its working memory included.
    """
    engines = tuple(_within(e, total) if e.backend == backend else e for e in bundle.manifest.engines)
    return replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, engines=engines))


def _within(engine: CompiledEngine, total: int) -> CompiledEngine:
    wanted = engine.weight_streaming_budget
    if not (engine.streamable or wanted is not None):
        return engine
    room = max(0, total - engine.memory_bytes - BASE)
    return msgspec.structs.replace(engine, weight_streaming_budget=room if wanted is None else min(wanted, room))
