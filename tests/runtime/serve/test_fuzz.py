"""Whatever fits the published schema, or does not, is answered, and never with an error of the server's own."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from tests.runtime.serve.conftest import SECONDS, make_service, serving
from zimgkit.runtime.serve.app import Access, create_app

EXAMPLES = int(os.environ.get("ZIMG_FUZZ_EXAMPLES", "5"))
"""Of each kind, for each route."""
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.fixture(scope="module")
def bounded():
    """A server that takes requests of two seconds at most."""
    with serving(make_service(limits={"max_queue_seconds": 2.0})) as server:
        yield server


def test_no_request_is_the_servers_fault(bounded):
    # Not through its plugin for pytest: that needs an older one.
    schema = schemathesis.openapi.from_dict(httpx.get(f"{bounded.url}/openapi.json").json())
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    answered = Counter[tuple[str, int]]()
    for operation in (found.ok() for found in schema.get_all_operations()):
        for mode in modes:
            cases = operation.as_strategy(generation_mode=mode)

            @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
            @given(case=cases)
            def ask(case):
                answer = case.call(base_url=bounded.url, timeout=SECONDS)
                answered[case.operation.path, answer.status_code] += 1
                assert answer.status_code < 500, answer.text
                if answer.status_code >= 400:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

            with suppress(Unsatisfiable):  # What takes nothing can be given nothing wrong.
                ask()
    print(answered)
    assert answered["/v1/images/generations", 400] > 0


def test_the_schema_names_every_route():
    app = create_app(make_service(), Access(log=False))
    paths = set(app.app.app.openapi()["paths"])
    assert {"/v1/images/generations", "/v1/images/edits", "/v1/models", "/sdapi/v1/txt2img"} <= paths
