"""The spans of a request, as another library collects them."""

from __future__ import annotations

import httpx
import pytest

from tests.runtime.serve.conftest import SECONDS, make_service, serving, until

trace = pytest.importorskip("opentelemetry.trace", reason="opentelemetry-api is not installed")
pytest.importorskip("opentelemetry.sdk.trace", reason="opentelemetry-sdk is not installed")

TRACE, PARENT = 0xAF7651916CD43DD8448EB211C80319C7, 0xB7AD6B7169203331
OURS = ("encode", "steps", "decode")


@pytest.fixture
def spans(monkeypatch):
    """Spans that have ended, in memory."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return exporter.get_finished_spans


def own(spans):
    return [span for span in spans() if span.name in OURS]


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_device_does_is_under_who_asked(spans, stream):
    with serving(make_service(warm_up=False)) as server:
        for number in (1, 2):
            body = {"prompt": "a red circle", "num_inference_steps": 2, "size": "32x32", "stream": stream}
            headers = {"traceparent": f"00-{TRACE + number:032x}-{PARENT + number:016x}-01"}
            answer = httpx.post(f"{server.url}/v1/images/generations", json=body, headers=headers, timeout=SECONDS)
            assert answer.status_code == 200
        until(lambda: len(own(spans)) == 6, "all spans have ended")
    parents = {span.context.span_id: span.parent.span_id for span in spans() if span.parent}
    for number in (1, 2):
        found = [span for span in own(spans) if span.context.trace_id == TRACE + number]
        assert [span.name for span in found] == [*OURS]
        for span in found:
            assert span.attributes["zimg.model"] == "zimg-tiny-z"
            above = span.parent.span_id
            while above in parents:  # The web framework may have spans of its own between.
                above = parents[above]
            assert above == PARENT + number
        assert found[0].end_time <= found[1].start_time <= found[1].end_time <= found[2].start_time


@pytest.mark.parametrize("traceparent", ["", "00-0-0-01", "\u00ff" * 55, "x" * 5000])
def test_a_broken_trace_is_none(spans, traceparent):
    with serving(make_service(warm_up=False)) as server:
        headers = [("traceparent", traceparent.encode("latin-1"))]
        body = {"prompt": "a red circle", "num_inference_steps": 1, "size": "32x32"}
        answer = httpx.post(f"{server.url}/v1/images/generations", json=body, headers=headers, timeout=SECONDS)
        assert answer.status_code == 200
        until(lambda: len(own(spans)) == 3, "all spans have ended")
