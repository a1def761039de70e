"""OpenTelemetry's spans of what a request takes, where its package is installed and set up; else nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any


@cache
def _api(name: str) -> Any:
    """A module of OpenTelemetry's API, None where it is not installed."""
    try:
        return import_module(f"opentelemetry.{name}")
    except ImportError:
        return None


def current() -> Any:
    """What spans are begun under here, to be given to :func:`span` in another thread."""
    api = _api("context")
    return api.get_current() if api else None


@contextmanager
def caller(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[None]:
    """Begin spans within under those of who sent these headers (``traceparent``)."""
    context, propagate = _api("context"), _api("propagate")
    if context is None or propagate is None:
        yield
        return
    sent = {key.decode("latin-1"): value.decode("latin-1") for key, value in headers}
    token = context.attach(propagate.extract(sent))
    try:
        yield
    finally:
        context.detach(token)


@contextmanager
def span(name: str, under: Any = None, **attributes: str | int | float) -> Iterator[None]:
    """Time what is done within as a span.

    Args:
        name: of the span.
        under: what :func:`current` gave where it was asked for; by default what is current here.
        attributes: of the span, without their ``zimg.``.
    """
    trace = _api("trace")
    if trace is None:
        yield
        return
    said = {f"zimg.{key}": value for key, value in attributes.items()}
    with trace.get_tracer("zimgkit.serve").start_as_current_span(name, under, attributes=said):
        yield
