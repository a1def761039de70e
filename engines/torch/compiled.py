"""The backend ``torch-compiled``: the fallback, its blocks compiled by ``torch.compile``."""

from __future__ import annotations

from functools import partial

from zimgkit.engines.torch import engine

open_engine = partial(engine.open_engine, compiled=True)
