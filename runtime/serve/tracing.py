"""OpenTelemetry's spans of what a request takes, where its package is installed and set up; else nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any


@cache
def _tracer() -> Any:
    try:
        return import_module("opentelemetry.trace").get_tracer("zimgkit.serve")
    except ImportError:
        return None


@contextmanager
def span(name: str, **attributes: str | int | float) -> Iterator[None]:
    """Time what is done within as a span."""
    tracer = _tracer()
    if tracer is None:
        yield
        return
    with tracer.start_as_current_span(name, attributes={f"zimg.{key}": value for key, value in attributes.items()}):
        yield
