from __future__ import annotations

import engine_memory
import numpy as np

from zimgkit.runtime import demo_models


def test_what_an_engine_takes():
    folder = demo_models.locate("zimg-tiny-z")
    found = engine_memory.measured(folder, "vae_decoder", "onnxruntime", 256)
    found |= engine_memory.reckoned(folder, "vae_decoder", "onnxruntime", 256)
    assert set(found) == set(engine_memory.FIGURES)
    assert 2e6 < found["working"] < 1e9
    row = {"bundle": "tiny", "backend": "onnxruntime", "component": "vae_decoder", "size": 256} | found
    assert str(round(found["working"] / 2**20)) in engine_memory.report([row]).splitlines()[1]


def test_memory_is_watched():
    with engine_memory.watch() as peak:
        kept = np.ones(5 << 20)
    assert kept.nbytes - (1 << 20) <= peak[0] < 2 * kept.nbytes
